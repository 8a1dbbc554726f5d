"""One rank of `benchmarks.scale`: prefills a model of which it holds a part.

Arguments: ranks that share out the layers, a JSON list of prompt lengths, runs. Rank 0
prints the best seconds of each length, and the CPU time over wall time of all ranks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
}


def model_of() -> Any:
    """Return a random Llama of 150 million parameters, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@torch.no_grad()
def prefill(tp: int, lengths: list[int], runs: int) -> list[dict[str, Any]]:
    """Return the best run of each length; all ranks begin and end together."""
    import graphopt
    from graphopt.integrations.pipelining import pipeline_mesh, shard

    torch.set_num_threads(1)
    mesh = pipeline_mesh(tp, 1)
    model = model_of()
    shard(model, mesh["tp"])
    graphopt.compile(model)
    rows = []
    for tokens in lengths:
        ids = torch.randint(3, SIZES["vocab_size"], (1, tokens))
        found = [_timed(model, ids) for _ in range(runs + 1)][1:]
        rows.append({"tokens": tokens, **min(found, key=lambda row: row["seconds"])})
    dist.destroy_process_group()
    return rows


def _timed(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    dist.barrier()
    cpu, start = time.process_time(), time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    dist.barrier()
    seconds = time.perf_counter() - start
    used = torch.tensor([time.process_time() - cpu])
    dist.all_reduce(used)
    share = float(used) / (seconds * dist.get_world_size())
    return {"seconds": round(seconds, 4), "utilisation": round(share, 3)}


if __name__ == "__main__":
    found = prefill(int(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
    if os.environ["RANK"] == "0":
        print("RESULT " + json.dumps(found), flush=True)
