"""On each rank: stages of one model, compared with the whole model in this process.

Arguments: JSON objects, one a pipeline: ``tp``, ``per_rank`` stages, ``host``, the
number of ``layers``, whether the head is ``tied`` to the embedding, the ``device`` to
move to, and what to run, each a list of pass configs: ``ragged`` micro-batches of
chunks and decodes, ``requests`` with caches of their own. Rank 0 says of each the
largest difference from the whole model under the same config, and the effect of the
config.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import transformers as tf

from graphopt import Cache
from graphopt.errors import GraphoptError
from graphopt.integrations.pipelining import (
    PipelineEngine,
    RaggedPipeline,
    RequestPipeline,
    pipeline_mesh,
    shard,
)
from graphopt.runtime import EngineOptions, SamplingParams
from graphopt.runtime.engine import Piece
from tests.distributed.launch import say
from tests.models import token_ids
from tests.rewriting import rewritten

DEFAULTS = {
    "tp": 1,
    "per_rank": 1,
    "host": "traced",
    "layers": 2,
    "tied": False,
    "device": None,
}
PAGES = 16  # four for each of four requests


def model_of(job: dict[str, Any]) -> Any:
    """Return the same small random Llama on every rank."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=job["layers"],
        tie_word_embeddings=job["tied"],
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        initializer_range=0.06,
    )
    return tf.LlamaForCausalLM(config).eval()


def steps(requests: list[list[int]]) -> list[list[list[Piece]]]:
    """Return steps of four micro-batches: chunks, decodes beside them, and none."""

    def piece(row: int, past: int, end: int, samples: bool) -> Piece:
        pages = (row, row + 4, row + 8)
        return Piece(row, tuple(requests[row][past:end]), past, pages, samples)

    return [
        [
            [piece(0, 0, 14, False)],
            [piece(1, 0, 10, True)],
            [],
            [piece(2, 0, 65, True)],
        ],
        [
            [piece(0, 14, 22, True), piece(1, 10, 11, True)],
            [piece(2, 65, 66, True), piece(3, 0, 12, False)],
            [],
            [],
        ],
        [
            [piece(3, 12, 20, True), piece(0, 22, 23, True), piece(2, 66, 67, True)],
            [piece(1, 11, 12, True)],
            [],
            [],
        ],
    ]


def ragged(job: dict[str, Any], mesh: Any, config: str) -> dict[str, Any]:
    """Run chunks and piggybacked decodes, each compared with its request alone."""
    model, whole = model_of(job), model_of(job)
    shard(model, mesh["tp"])
    pipe = RaggedPipeline(
        model,
        mesh["pp"].get_group(),
        config=config or None,
        buckets=(16, 24, 65),
        pages=PAGES,
        rows=4,
        max_length=192,
        per_rank=job["per_rank"],
        host=job["host"],
        device=job["device"],
    )
    kept = sum(
        t.untyped_storage().nbytes() for c in pipe.caches.values() for t in c.keys
    )
    requests = [token_ids(1, 70, seed=row)[0].tolist() for row in range(4)]
    expected = [whole(torch.tensor([tokens])).logits[0] for tokens in requests]
    differences = []
    for batches in steps(requests):
        for rows, pieces in zip(pipe.run(batches), batches, strict=True):
            sampled = [p for p in pieces if p.samples]
            for row, p in zip(rows, sampled, strict=True):
                wanted = expected[p.request][p.past + len(p.tokens) - 1]
                differences.append(float((row - wanted).abs().max()))
    return {
        "difference": max(differences),
        "rows": len(differences),
        "graphs": len(pipe.staged.reports),
        "page_bytes": kept,
        "generated": _generated(pipe, model, whole),
        "refused": _refused(pipe),
    }


def _generated(pipe: RaggedPipeline, model: Any, whole: Any) -> bool:
    """Tell whether an engine writes what the whole model writes."""
    options = EngineOptions(budget=24, tile=8, max_running=4)
    engine = PipelineEngine(pipe, model, options)
    prompts = [token_ids(1, n, seed=n)[0].tolist() for n in (5, 40, 33)]
    written = engine.generate(prompts, SamplingParams(max_new_tokens=4))
    for prompt, tokens in zip(prompts, written, strict=True):
        found = whole.generate(
            torch.tensor([prompt]), max_new_tokens=4, do_sample=False
        )
        if found[0, len(prompt) :].tolist() != tokens:
            return False
    return True


def _refused(pipe: RaggedPipeline) -> list[str]:
    """Return the errors of a step that is too large, and of one request twice."""
    piece = Piece(0, (5,) * 66, 0, (0, 1), True)
    found = []
    for batches in ([[piece]], [[Piece(0, (5,), 0, (0,), True)]] * 2):
        try:
            pipe.run(batches)
        except GraphoptError as error:
            found.append(str(error))
    return found


def differs(job: dict[str, Any], mesh: Any, config: str) -> dict[str, Any]:
    """Make pipelines that are not the same on every rank; return rank 0's errors."""
    model, group = model_of(job), mesh["pp"].get_group()
    rank = dist.get_rank()
    found = {}
    given: dict[str, Any] = {
        "buckets": {"buckets": (16, 24 + rank)},
        "config": {"config": "" if rank else config},
        "bad": {"config": "unheard-of" if rank else ""},
    }
    for name, options in given.items():
        try:
            RaggedPipeline(model, group, host="traced", **options)
        except GraphoptError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def requests(job: dict[str, Any], mesh: Any, config: str) -> dict[str, Any]:
    """Run two prompts and their decoding under ``config``; release weights after."""
    model, whole = model_of(job), model_of(job)
    compares = dist.get_rank() == 0
    twin = rewritten(whole, config)
    shard(model, mesh["tp"])
    pipe = RequestPipeline(
        model,
        mesh["pp"].get_group(),
        config=config,
        per_rank=job["per_rank"],
        host=job["host"],
        max_tokens=192,
        device=job["device"],
    )
    calls = [token_ids(1, 140, seed=row) for row in range(2)]
    theirs = [Cache.from_config(config, whole, max_tokens=192) for _ in calls]
    plain = [Cache(max_tokens=192) for _ in calls]
    found = {"difference": 0.0, "effect": 0.0, "released": pipe.released}
    for step in range(3):
        rows = pipe.run([(row, ids[0].tolist()) for row, ids in enumerate(calls)])
        for row, ids in enumerate(calls if compares else ()):
            wanted = _last(twin, ids, theirs[row])
            unmodified = _last(whole, ids, plain[row])
            _note(found, "difference", rows[row] - wanted)
            _note(found, "effect", rows[row] - unmodified)
        calls = [row.argmax().reshape(1, 1) for row in rows]
        if step == 1:
            found["released"] += pipe.staged.release()
            found["page_bytes"] = _page_bytes(pipe)
    records = [r for report in pipe.staged.reports for r in report.records]
    return {**found, "changed": sum(record.changed for record in records)}


def _page_bytes(pipe: RequestPipeline) -> list[int]:
    """Return what is kept of the first request's keys, layer by layer."""
    ((_, cache),) = pipe._caches[0].items()
    return [layer.full.keys.untyped_storage().nbytes() for layer in cache.layers]


def _last(model: Any, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    output = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return output.logits[0, -1]


def _note(found: dict[str, Any], name: str, difference: torch.Tensor) -> None:
    found[name] = max(found[name], float(difference.abs().max()))


KINDS = {"ragged": ragged, "requests": requests, "differs": differs}


@torch.no_grad()
def run(given: dict[str, Any]) -> dict[str, Any]:
    """Run what one job asks for."""
    torch._dynamo.reset()
    job = {**DEFAULTS, **given}
    mesh = pipeline_mesh(job["tp"], int(os.environ["WORLD_SIZE"]) // job["tp"])
    return {
        kind: [function(job, mesh, config) for config in job.get(kind, [])]
        for kind, function in KINDS.items()
    }


if __name__ == "__main__":
    say([run(json.loads(text)) for text in sys.argv[1:]])
    dist.destroy_process_group()
