"""`schedule`: the chunks of a prompt run out of order on several processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from graphopt.errors import PassError
from graphopt.ir.loops import ChunkOrder, is_body, set_order
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.op_groups import OpGroup, op_groups
from graphopt.passes.base import Pass, PassContext, PassResult, Selects, option
from graphopt.remarks import Remark, applied, missed


@dataclass(frozen=True, kw_only=True)
class Schedule(Pass):
    """Let the op groups of several chunks run beside one another.

    The body of the loop that chunked-prefill made is cut, in each layer, into the norm
    and linears in front of attention, attention, and what is behind it. A group of one
    chunk is a task. Static groups wait for the group before them, attention also for
    the keys of every chunk up to its own, so that chunk 1 is in its first layers while
    chunk 0 is in later ones. Tasks run on worker threads of a CPU, each with its share
    of torch's threads, or on streams of a GPU.

    Nothing is computed otherwise than in order: the same compiled groups read the same
    tensors. A last chunk that takes tokens of the one before again writes their keys
    when the attention that reads the earlier ones has run, as it does in order. Results
    are in-order's, bit for bit where kernels give the same on any number of threads.

    The first prompts run in order and are measured. A plan for each number of chunks is
    then simulated with these durations, tried where it is predicted to be faster than
    one chunk after the other on the whole machine, and kept if it is; a remark tells.
    Pays where one task leaves part of the machine idle: many cores and short chunks, or
    processors of several kinds. Not with autograd on (``torch.no_grad``). Up to all
    chunks are under way at once, with a hidden state each.

    Before::

        %layers, %k, %v = chunks(%h, %cos, %sin, ...)
          %q = linear(%norm, ...)
          append_rows(%k, %keys, %past)
          %o = graphopt.attention(%q, %keys, ..., 'causal', %past)
          %h' = linear(%o, ...)

    After (the graph is the same; what runs is)::

        worker 0:  qkv(0)  attention(0)  ffn(0)        qkv'(0)  ...
        worker 1:          qkv(1)        attention(1)  ffn(1)   ...

    Refuses when

    - ``no-loop``: no chunked-prefill made a loop of the layers; it stands in front of
      this pass;
    - ``not-cut``: a layer reads keys of another, writes to what all chunks read, or
      draws random numbers;
    - ``one-thread``, ``autograd``: found when prompts run;
    - ``sharded``: ranks that share out the layers would run them in different orders;
    - ``device``, ``cuda-graphs``: neither a CPU nor CUDA, or a mode with CUDA graphs.
    """

    name: ClassVar[str] = "schedule"
    source: ClassVar[str] = "mllm-NPU, llm.npu (Xu et al. 2025, section 3.4)"
    exact: ClassVar[bool] = True

    policy: Literal["greedy", "in-order", "stagger", "critical-path"] = option(
        "greedy",
        "which ready task runs first: what unlocks most (the paper), chunk by chunk, "
        "two chunks in step (mllm), what the longest chain hangs on",
    )
    processors: int = option(2, "worker threads, or streams of a GPU", "processors")

    @property
    def selects_over(self) -> Selects:
        """Ranks that run chunks in different orders would sum different chunks."""
        return "durations"

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.processors < 1:
            raise ValueError("processors is at least 1")
        return self

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Give the loop around the graph an order."""
        if not is_body(model.gm):
            text = "no loop over chunks is here: schedule needs chunked-prefill before"
            return PassResult(False, (missed("graph", "no-loop", f"{text} it"),))
        try:
            groups = op_groups(model.gm)
        except PassError as error:
            return PassResult(False, (missed("chunks", "not-cut", str(error)),))
        set_order(model.gm, ChunkOrder(self.policy, self.processors, self.force))
        return PassResult(True, (self._remark(groups),), {"groups": len(groups)})

    def _remark(self, groups: list[OpGroup]) -> Remark:
        layers = sum(group.dynamic for group in groups)
        text = (
            f"{len(groups)} tasks a chunk in {layers} layers, {self.policy} on "
            f"{self.processors} processors"
        )
        return applied("chunks", text, groups=len(groups), layers=layers)
