"""On each rank: a model with half its heads and neurons, rewritten by pass configs.

Arguments: the model's directory and a JSON list of pass configs. Rank 0 says what it
found for each, compared with the whole model in one process under the same config.
transformers shares the model out; for configs that start with ``torch:`` torch does. A
config that starts with ``!`` runs without the sums that passes add, as a control; one
that starts with ``aot:`` runs as Inductor would get it, the others operator by
operator. One that starts with ``generate:`` is compared over the tokens and logits of a
greedy generation.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import fx, nn
from transformers import DynamicCache

from graphopt.ir.collectives import count_collectives
from graphopt.ops.pages import pages_of
from graphopt.runtime.cache import Cache, wanted_by
from tests.distributed.launch import say
from tests.rewriting import rewritten, traced


def whole(path: str) -> Any:
    """Return the model as one process loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def shared(path: str, how: str) -> Any:
    """Return this rank's part of the model."""
    if how == "torch":
        return _parallelized(whole(path))
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=plan).eval()


def _parallelized(model: Any) -> Any:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, Any] = {}
    for index in range(model.config.num_hidden_layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            plan[f"model.layers.{index}.{name}"] = ColwiseParallel()
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            plan[f"model.layers.{index}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.{index}.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


class Watch:
    """Counts graphs and their collectives on the way to what runs them."""

    def __init__(self, lowered: bool) -> None:
        self.collectives: list[int] = []
        self.lowered = lowered

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        """Run the graph, as Inductor would get it if asked to."""
        self.collectives.append(count_collectives(gm))
        return traced(gm, inputs) if self.lowered else gm


def predict(model: Any, config: str, ids: torch.Tensor) -> tuple[Any, ...]:
    """Return the logits behind the prompt."""
    return model(ids, use_cache=False, logits_to_keep=1).logits, None, None


def generate(model: Any, config: str, ids: torch.Tensor) -> tuple[Any, ...]:
    """Return logits [steps, V], tokens and cache of a greedy generation of one row."""
    asked = wanted_by(config)
    cache = DynamicCache() if asked is None else Cache.from_config(config, model)
    model.generation_config.eos_token_id = None
    found = model.generate(
        ids[:1].contiguous(),
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(found.logits), found.sequences[0, ids.shape[1] :].tolist(), cache


def pages_read(cache: Any) -> list[int]:
    """Return how many pages each KV head of the last layer read, and a row has."""
    if not isinstance(cache, Cache):
        return []
    chosen = (cache.layers[-1].selected[0] >= 0).sum(1)
    return [*chosen.tolist(), pages_of(cache.get_seq_length())]


def run(model: nn.Module, config: str, ids: torch.Tensor) -> dict[str, Any]:
    """Return the logits under ``config``, its graphs, collectives and remarks."""
    config = config.removeprefix("torch:")
    watch, reports = Watch(config.startswith("aot:")), []
    call = generate if config.startswith("generate:") else predict
    config = config.removeprefix("aot:").removeprefix("generate:")
    broken, config = config.startswith("!"), config.removeprefix("!")
    control = mock.patch("graphopt.ir.shards.summed_behind", return_value=None)
    twin = rewritten(model, config, host=watch, reports=reports, copied=False)
    with torch.no_grad(), control if broken else nullcontext():
        logits, tokens, cache = call(twin, config, ids)
    remarks = [r for report in reports for r in report.all_remarks()]
    return {
        "logits": logits,
        "tokens": tokens,
        "pages": pages_read(cache),
        "collectives": watch.collectives,
        "applied": sum(r.kind == "applied" for r in remarks),
        "codes": sorted({r.code for r in remarks if r.kind in ("missed", "failure")}),
        "local": sum(r.code == "local" for r in remarks),
        "said": sorted({str(r) for r in remarks if r.code in ("sharded", "undone")}),
    }


def main(path: str, configs: list[str]) -> None:
    """Compare every config with the whole model under it, and without."""
    ids = torch.randint(3, 99, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = {call: call(whole(path), "", ids)[0] for call in (predict, generate)}
    parts = {how: shared(path, how) for how in ("transformers", "torch")}
    ours = [run(parts[_engine(config)], config, ids) for config in configs]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: list[Any] = [None] * ranks
    mine = {}
    # What one process does is shared out too: it takes as long.
    for index in range(rank, len(configs), ranks):
        config = configs[index]
        before = plain[generate if config.startswith("generate:") else predict]
        mine[index] = _compared(ours[index], run(whole(path), config, ids), before)
    dist.all_gather_object(found, mine)
    say([found[index % ranks][index] for index in range(len(configs))])


def _engine(config: str) -> str:
    return "torch" if config.startswith("torch:") else "transformers"


def _compared(
    ours: dict[str, Any], alone: dict[str, Any], plain: torch.Tensor
) -> dict[str, Any]:
    """Return the differences: to one process, and to the model as it is."""
    logits = ours.pop("logits")
    difference = (logits - alone["logits"]).abs().max().item()
    effect = (logits - plain).abs().max().item()
    same = {"alone": alone["applied"], "tokens_alone": alone["tokens"]}
    return {**ours, **same, "difference": difference, "effect": effect}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(sys.argv[1], json.loads(sys.argv[2]))
    dist.destroy_process_group()
