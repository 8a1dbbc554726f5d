"""The vertical-slash row of the attention benchmark, on real queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import compare
from graphopt.codegen.predicates import BLOCK, count_pairs
from graphopt.models import load
from graphopt.ops import VisitList, select_vertical_slash, visit_attention
from graphopt.texts import language_reference

# Sinks, window, columns and slashes a head: mean KL 0.08 on SmolLM2 at 8192 tokens.
SIZES = {"sink": [30], "window": [256], "vertical": [400], "slash": [100]}


@torch.no_grad()
def vertical_slash_row(tokens: int, runs: int) -> dict[str, Any]:
    """Time selection and attention against dense SDPA on the same tensors."""
    q, k, v = captured(tokens)

    def select() -> VisitList:
        return select_vertical_slash(q, k, None, *SIZES.values())

    lists = select()
    sides = {
        "selection": select,
        "graphopt": lambda: visit_attention(q, k, v, None, lists),
        "dense": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
    }
    found = compare(sides, runs)
    heads = q.shape[1]
    pairs = sum(_pairs(lists, head, tokens) for head in range(heads)) / heads
    return {
        "pattern": "vertical-slash",
        "tokens": tokens,
        "seconds": round(found["graphopt"].best, 4),
        "selection_seconds": round(found["selection"].best, 4),
        "dense_seconds": round(found["dense"].best, 4),
        "flex_seconds": None,
        "density": round(pairs / count_pairs("causal", tokens, tokens), 4),
        "utilisation": round(found["graphopt"].utilisation, 4),
    }


class _Found(Exception):
    """Ends the forward pass once the tensors are there."""


def captured(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of the middle layer on the language reference."""
    loaded = load("smollm2")
    text = language_reference()[: 8 * tokens]
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    wanted = loaded.model.config.num_hidden_layers // 2
    original, calls = F.scaled_dot_product_attention, []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> Any:
        calls.append((q, k, v))
        if len(calls) > wanted:
            raise _Found
        return original(q, k, v, **rest)

    F.scaled_dot_product_attention = watched
    try:
        loaded.model(ids)
    except _Found:
        pass
    finally:
        F.scaled_dot_product_attention = original
    return calls[-1]


def _pairs(lists: VisitList, head: int, tokens: int) -> int:
    """Count the pairs that one head visits, block by block of rows."""
    runs = lists.runs[0, head, : lists.run_count[0, head]].tolist()
    columns = lists.columns[0, head, : lists.column_count[0, head]].long()
    total = 0
    for first in range(0, tokens, BLOCK):
        seen = torch.zeros(tokens, dtype=torch.bool)
        for near, far in runs:
            seen[max(first - far + 1, 0) : max(first - near + 1, 0)] = True
        seen[columns] = True
        rows = min(BLOCK, tokens - first)
        # Keys up to the block's first row are seen by all rows, later ones by fewer.
        later = torch.arange(rows - 1, 0, -1)
        total += rows * int(seen[: first + 1].sum())
        total += int(later[seen[first + 1 : first + rows]].sum())
    return total
