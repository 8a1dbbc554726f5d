"""``graphopt run --pp``: one prompt through the stages of several processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ModelError
from graphopt.integrations.pipelining.mesh import pipeline_mesh, shard
from graphopt.integrations.pipelining.requests import RequestPipeline
from graphopt.memory import peak_mb, reset_peak
from graphopt.models import load
from graphopt.report import CompileReport
from graphopt.runtime.engine.models import for_model
from graphopt.runtime.engine.options import EngineOptions


@dataclass
class Generated:
    """What a rank found, the same tokens and ``logits`` [steps, V] on each.

    Times are in seconds. ``utilisation`` is CPU time over wall time and threads of the
    prefill: a stage waits for the others, so it is low with few micro-batches.
    ``peak_mb``: of resident memory while it generates. ``released_bytes``: of weights
    that other stages hold.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    utilisation: float = 0.0
    peak_mb: float = 0.0
    released_bytes: int = 0
    logits: Tensor | None = None
    reports: list[CompileReport] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: str,
    config: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    tp: int,
    pp: int,
    *,
    forced: Sequence[int] = (),
    dtype: str = "float32",
    host: str = "inductor",
) -> Generated:
    """Generate greedily behind ``prompt`` (token ids) on ``tp * pp`` processes.

    Each of the ``pp`` stages has some of the layers, whose heads and neurons its ``tp``
    ranks share out. The passes of ``config`` see the whole model. With ``forced``
    tokens the logits follow these. ``host``: inductor, or traced for rewritten graphs
    as they are. One prompt is one micro-batch: stages take turns, which is for models
    that do not fit; `PipelineEngine` keeps all stages at work.

    Raises ConfigError for another number of processes, ModelError for a model that
    cannot be loaded, cut or shared out.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = pipeline_mesh(tp, pp, device)
    loaded = load(model, getattr(torch, dtype))
    if loaded.tokenizer is None or not loaded.model.can_generate():  # type: ignore[operator]
        raise ModelError(f"{model}: not a language model with a tokenizer")
    ends = for_model(EngineOptions(), loaded.model).eos_token_ids
    shard(loaded.model, mesh["tp"])
    room = len(prompt) + max(max_new_tokens, len(forced), 3)
    group = mesh["pp"].get_group()
    asked: dict[str, Any] = {"config": config, "max_tokens": room, "host": host}
    pipe = RequestPipeline(loaded.model, group, device=device, **asked)
    found = Generated()
    start = time.perf_counter()
    _follow(pipe, prompt, [0, 0])
    warm = time.perf_counter() - start
    found.released_bytes = pipe.released + pipe.staged.release()
    reset_peak()
    _timed(pipe, prompt, max_new_tokens, ends, found)
    found.peak_mb = peak_mb()
    found.compile_seconds = max(0.0, warm - found.prefill_seconds)
    found.logits = _follow(pipe, prompt, forced or found.tokens)
    found.text = loaded.tokenizer.decode(found.tokens, skip_special_tokens=True)
    found.reports = pipe.staged.reports
    return found


def _timed(
    pipe: RequestPipeline,
    prompt: Sequence[int],
    steps: int,
    ends: Sequence[int],
    found: Generated,
) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    found.tokens = [_next(pipe, prompt)]
    found.prefill_seconds = time.perf_counter() - start
    used = time.process_time() - cpu
    found.utilisation = used / (found.prefill_seconds * torch.get_num_threads())
    start = time.perf_counter()
    while len(found.tokens) < steps and found.tokens[-1] not in ends:
        found.tokens.append(_next(pipe, found.tokens[-1:]))
    found.decode_seconds = time.perf_counter() - start
    pipe.forget("prompt")


def _next(pipe: RequestPipeline, tokens: Sequence[int]) -> int:
    return int(pipe.run([("prompt", tokens)])[0].argmax())


def _follow(
    pipe: RequestPipeline, prompt: Sequence[int], tokens: Sequence[int]
) -> Tensor:
    """Return the logits [steps, V] from which each of ``tokens`` would be drawn."""
    calls = [prompt, *([token] for token in tokens[:-1])]
    rows = [pipe.run([("prompt", call)])[0] for call in calls]
    pipe.forget("prompt")
    return torch.stack(rows).float().cpu()
