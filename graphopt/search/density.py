"""How many query-key pairs attention visits, counted from what its operators got."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from graphopt.codegen.predicates import BLOCK, count_pairs
from graphopt.ops import VisitList


def visited_share(name: str, arguments: tuple[Any, ...]) -> float:
    """Return visited pairs over causal pairs of one call of operator ``name``.

    ``arguments`` are the operator's own (`graphopt.ops.attention`,
    `graphopt.ops.visit`), of a prefill that starts at key 0; mean over batch and heads.
    """
    query, key = arguments[:2]
    tokens = query.shape[2]
    if key.shape[2] != tokens:
        raise ValueError(
            f"{name}: {tokens} queries and {key.shape[2]} keys: no prefill"
        )
    if name == "graphopt.attention":
        return _static_share(tokens, query.shape[1], arguments)
    if key.shape[2] < _min_tokens(arguments, 12):
        return 1.0
    lists, dense_rows = VisitList(*arguments[4:8]), arguments[8]
    return list_share(lists, dense_rows, tokens, _Blocks.of(arguments))


class _Blocks(NamedTuple):
    """Block lists among the arguments: see `graphopt.ops.visit`; none: ``heads`` ()."""

    key_blocks: Any = None
    counts: Any = None
    heads: tuple[int, ...] = ()
    block: int = BLOCK

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> _Blocks:
        given = arguments[13:17]
        return cls(*given[:2], tuple(given[2]), given[3]) if len(given) == 4 else cls()

    def seen_keys(self, row: int, head: int, tokens: int) -> torch.Tensor | None:
        """Return which keys the head's list visits, or None where it has no list."""
        index = self.heads[head] if self.heads else -1
        if index < 0:
            return None
        runs = self.key_blocks[row, index].long() * self.block
        used = torch.arange(runs.shape[1]) < self.counts[row, index][:, None]
        runs = runs.masked_fill(~used[..., None], 0).clamp(max=tokens)
        seen = _spans(runs[..., 0], runs[..., 1], tokens)
        rows = -(-tokens // BLOCK)
        return seen.repeat_interleave(self.block // BLOCK, 0)[:rows]


def _min_tokens(arguments: tuple[Any, ...], index: int) -> int:
    return int(arguments[index]) if len(arguments) > index else 0


def _static_share(tokens: int, heads: int, arguments: tuple[Any, ...]) -> float:
    pattern, sinks, windows = arguments[4:7]
    if tokens < _min_tokens(arguments, 10):
        return 1.0
    count = max(len(sinks), len(windows))
    if count not in (1, heads):
        raise ValueError(f"tables of {count} values for {heads} heads")
    rows = [
        (sinks[i % len(sinks)], min(windows[i % len(windows)], _whole(tokens)))
        for i in range(count)
    ]
    pairs = [_static_pairs(pattern, tokens, *row) for row in rows]
    return sum(pairs) / len(pairs) / causal_pairs(tokens)


def _whole(tokens: int) -> int:
    """Return a window that covers every key, in whole blocks."""
    return (tokens // BLOCK + 1) * BLOCK


_NO_BLOCKS = _Blocks()


@cache
def _static_pairs(pattern: str, tokens: int, sink: int, window: int) -> int:
    return count_pairs(pattern, tokens, tokens, sink=sink, window=window)


def causal_pairs(tokens: int) -> int:
    """Return the pairs of dense causal attention."""
    return tokens * (tokens + 1) // 2


def list_share(
    lists: VisitList,
    dense_rows: Sequence[int],
    tokens: int,
    blocks: _Blocks = _NO_BLOCKS,
) -> float:
    """Return the share of the causal pairs that visit lists mean, mean over heads.

    One head at a time and by blocks of rows: [tokens / 64, tokens] truth values, never
    a mask over all pairs of all heads.
    """
    batch, heads = lists.run_count.shape
    total = 0
    for row in range(batch):
        for head in range(heads):
            last = dense_rows[head % len(dense_rows)]
            seen = blocks.seen_keys(row, head, tokens)
            if seen is None:
                seen = _seen_keys(lists, row, head, tokens)
            total += block_pairs(seen | _dense_blocks(last, tokens)[:, None], tokens)
    return total / (batch * heads) / causal_pairs(tokens)


def _seen_keys(lists: VisitList, row: int, head: int, tokens: int) -> torch.Tensor:
    """Return which keys each block of rows visits, [blocks, tokens]."""
    first = torch.arange(0, tokens, BLOCK)[:, None]
    runs = lists.runs[row, head, : lists.run_count[row, head]].long()
    # Key k is in run [near, far) of a block at m when m - far < k <= m - near.
    begin = (first - runs[:, 1] + 1).clamp(0, tokens)
    end = (first - runs[:, 0] + 1).clamp(0, tokens)
    seen = _spans(begin, end, tokens)
    columns = lists.columns[row, head, : lists.column_count[row, head]].long()
    seen[:, columns] = True
    return seen


def _spans(begin: torch.Tensor, end: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return which keys lie in a span [begin, end) of the row; [rows, tokens]."""
    steps = torch.zeros(len(begin), tokens + 1, dtype=torch.int32)
    steps.scatter_add_(1, begin, torch.ones_like(begin, dtype=torch.int32))
    steps.scatter_add_(1, end, torch.full_like(end, -1, dtype=torch.int32))
    return steps.cumsum(1)[:, :tokens] > 0


def _dense_blocks(last: int, tokens: int) -> torch.Tensor:
    """Return which blocks hold one of the last ``last`` rows."""
    end = (torch.arange(0, tokens, BLOCK) + BLOCK).clamp(max=tokens)
    return end > tokens - last


def block_pairs(seen: torch.Tensor, tokens: int) -> int:
    """Count the pairs of ``seen`` [blocks, tokens]: each row sees keys up to itself."""
    blocks = torch.arange(seen.shape[0])[:, None] * BLOCK
    ends = (blocks + BLOCK).clamp(max=tokens)
    key = torch.arange(tokens)
    # Rows of the block at or after the key, none for keys after the block.
    rows = (ends - torch.maximum(blocks, key)).clamp_min(0)
    return int((rows * seen).sum())
