"""On each rank: a model with half its heads and neurons, rewritten by pass configs.

Arguments: the model's directory and a JSON list of pass configs. Rank 0 says what it
found for each, compared with the whole model in one process under the same config.
transformers shares the model out; for configs that start with ``torch:`` torch does. A
config that starts with ``!`` runs without the sums that passes add, as a control; one
that starts with ``aot:`` runs as Inductor would get it, the others operator by
operator. One that starts with ``generate:`` is compared over the tokens and logits of a
greedy generation, the others over the logits behind a prompt: the model is traced once
for all of these, which takes most of the time. Those that start with ``vision:`` get a
prompt with images, and a model for it that torch shares out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import fx
from transformers import DynamicCache

from graphopt.backend import rewrite
from graphopt.distributed import localise
from graphopt.ir.collectives import count_collectives
from graphopt.ir.copying import copy_module
from graphopt.ops.pages import pages_of
from graphopt.options import parse_options
from graphopt.remarks import Remark
from graphopt.runtime.cache import Cache, wanted_by
from tests.distributed.launch import say
from tests.distributed.shared_models import parallelized, shared, whole
from tests.rewriting import traced
from tests.vision_configs import PATCHES, encoded, prompt, vision_model

_PREFIXES = ("torch:", "vision:", "generate:", "aot:", "!")
_BEHIND: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
_Inputs = dict[str, Any]


class Run:
    """What becomes of a model's graphs under one config, and what comes out."""

    def __init__(self, config: str) -> None:
        self.config = config
        for prefix in _PREFIXES:
            self.config = self.config.removeprefix(prefix)
        self.lowered, self.broken = "aot:" in config, "!" in config
        self.collectives: list[int] = []
        self.remarks: list[Remark] = []
        self.logits: Any = None
        self.tokens: Any = None
        self.pages: list[int] = []

    def compile(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Return what runs ``gm``, rewritten in place."""
        control = mock.patch("graphopt.ir.shards.summed_behind", return_value=None)
        local = localise(gm, inputs)
        with control if self.broken else nullcontext():
            report, _ = rewrite(gm, parse_options({"config": self.config}))
        self.remarks += report.all_remarks()
        self.remarks += [] if local.remark is None else [local.remark]
        self.collectives.append(count_collectives(gm))
        compiled = traced(gm, local.inputs) if self.lowered else gm
        return lambda *given: compiled(*local.arguments(given))

    def told(self) -> dict[str, Any]:
        """Return what was seen but the logits."""
        missed = [r for r in self.remarks if r.kind in ("missed", "failure")]
        said = [r for r in missed if r.code in ("sharded", "undone")]
        return {
            "tokens": self.tokens,
            "pages": self.pages,
            "collectives": self.collectives,
            "applied": sum(r.kind == "applied" for r in self.remarks),
            "codes": sorted({r.code for r in missed}),
            "said": sorted(map(str, said)),
        }


def run_all(model: Any, configs: Sequence[str], inputs: _Inputs) -> dict[str, Run]:
    """Return what ``model`` did under each of ``configs``."""
    runs = {config: Run(config) for config in configs}
    made = [run for config, run in runs.items() if "generate:" in config]
    with torch.no_grad():
        predict(model, [run for run in runs.values() if run not in made], inputs)
        for run in made:
            generate(model, run, inputs["input_ids"])
    return runs


def predict(model: Any, runs: Sequence[Run], inputs: _Inputs) -> None:
    """Find the logits behind the prompt, by one graph in as many versions."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        # The last gets the graph itself, which knows more of where it comes from.
        graphs = [_copied(gm) for _ in runs[1:]] + [gm]
        compiled = [r.compile(g, inputs) for r, g in zip(runs, graphs, strict=True)]

        def call(*given: Any) -> Any:
            results = [one(*given) for one in compiled]
            for run, result in zip(runs, results, strict=True):
                run.logits = result[0]
            return results[0]

        return call

    if runs:
        torch._dynamo.reset()
        model(**inputs, **_BEHIND)  # transformers installs hooks at a first call
        model.compile(backend=backend, dynamic=True)
        model(**inputs, **_BEHIND)


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    copy = copy_module(gm)
    copy.meta = dict(gm.meta)
    return copy


def generate(model: Any, run: Run, ids: torch.Tensor) -> None:
    """Find the logits [steps, V] and the tokens of a greedy generation of one row."""
    torch._dynamo.reset()  # else the limit of recompilations leaves it as it was
    model.compile(backend=run.compile, dynamic=True)
    asked = wanted_by(run.config)
    cache = DynamicCache() if asked is None else Cache.from_config(run.config, model)
    found = _generated(model, ids, cache)
    run.logits = torch.cat(found.logits)
    run.tokens = found.sequences[0, ids.shape[1] :].tolist()
    run.pages = _pages_read(cache)


def _generated(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    model.generation_config.eos_token_id = None
    return model.generate(
        ids[:1].contiguous(),
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )


def _pages_read(cache: Any) -> list[int]:
    """Return how many pages each KV head without a ring read, and a row has."""
    if not isinstance(cache, Cache):
        return []
    chosen = torch.cat([layer.selected[0] for layer in cache.layers])
    return [*(chosen >= 0).sum(1).tolist(), pages_of(cache.get_seq_length())]


def main(path: str, configs: list[str]) -> None:
    """Compare every config with the whole model under it, and without."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine: dict[str, dict[str, Any]] = {}
    for kind in ("transformers", "torch", "vision"):
        chosen = [config for config in configs if _kind(config) == kind]
        inputs = _inputs(kind)
        ours = run_all(_part(kind, path), chosen, inputs)
        # What one process does is shared out too: it takes as long.
        alone = run_all(_whole(kind, path), chosen[rank::ranks], inputs)
        plain = _plain(_whole(kind, path), inputs)
        for config, run in alone.items():
            compared = _compared(ours[config], run, plain[run.tokens is not None])
            mine[config] = compared
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, mine)
    told = {config: result for part in found for config, result in part.items()}
    say([told[config] for config in configs])


def _kind(config: str) -> str:
    kind = config.partition(":")[0]
    return kind if kind in ("torch", "vision") else "transformers"


def _whole(kind: str, path: str) -> Any:
    return vision_model("llava") if kind == "vision" else whole(path)


def _part(kind: str, path: str) -> Any:
    if kind == "vision":
        return parallelized(vision_model("llava"))
    return shared(path, kind)


def _inputs(kind: str) -> _Inputs:
    if kind == "vision":
        return {**prompt([60, 52], [[5], [3]], PATCHES), **encoded(2, PATCHES)}
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, 99, (2, 150), generator=generator)}


def _plain(model: Any, inputs: _Inputs) -> list[torch.Tensor]:
    """Return the logits behind the prompt, and of a generation without images."""
    with torch.no_grad():
        behind = model(**inputs, **_BEHIND).logits
        if len(inputs) > 1:
            return [behind]
        generated = _generated(model, inputs["input_ids"], DynamicCache()).logits
    return [behind, torch.cat(generated)]


def _compared(ours: Run, alone: Run, plain: torch.Tensor) -> dict[str, Any]:
    """Return the differences: to one process, and to the model as it is."""
    difference = (ours.logits - alone.logits).abs().max().item()
    effect = (ours.logits - plain).abs().max().item()
    same = {"alone": alone.told()["applied"], "tokens_alone": alone.tokens}
    return {**ours.told(), **same, "difference": difference, "effect": effect}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(sys.argv[1], json.loads(sys.argv[2]))
    dist.destroy_process_group()
