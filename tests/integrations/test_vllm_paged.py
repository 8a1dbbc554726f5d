"""vLLM's cache of blocks, written and read by graphopt's kernel."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import ConfigError
from graphopt.integrations.vllm.heads import LocalHeads, Plan
from graphopt.integrations.vllm.paged import attend, write
from graphopt.passes.attention.heads import UNBOUNDED, HeadRule
from graphopt.passes.attention.sparse_attention import SparseAttention

PAGE, HEADS, GROUP, DIM = 64, 2, 2, 32


def cache_of(generator, lengths):
    """Return keys and values of requests, and a cache of pages in any order."""
    pages = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(pages) + 2, generator=generator)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    cache = torch.randn(len(order), HEADS, PAGE, 2 * DIM, generator=generator)
    held, taken = [], 0
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        table[row, :count] = order[taken : taken + count]
        taken += count
        shape = (length + 1, HEADS, DIM)  # the last is padding
        kv = [torch.randn(shape, generator=generator) for _ in range(2)]
        place = torch.arange(length)
        slots = table[row].long()[place // PAGE] * PAGE + place % PAGE
        write(cache, *kv, torch.cat((slots, torch.tensor([-1]))))
        held.append([x[:length] for x in kv])
    return cache, table, held


def dense(query, key, value, past, sink, window):
    """Attend in float64: query [N, Hq, D], key and value [T, Hkv, D]."""
    wide = [
        x.double().repeat_interleave(GROUP, 1).transpose(0, 1) for x in (key, value)
    ]
    scores = query.double().transpose(0, 1) @ wide[0].mT * DIM**-0.5
    q = torch.arange(len(query))[:, None] + past
    k = torch.arange(len(key))
    sinks, windows = (torch.tensor(x)[:, None, None] for x in (sink, window))
    seen = (k <= q) & ((k < sinks) | (k > q - windows))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide[1]).transpose(0, 1)


@pytest.mark.parametrize(
    "pairs",
    [((0, UNBOUNDED),), ((3, 20),), ((3, 20), (0, UNBOUNDED), (5, 70), (1, 9))],
    ids=["causal", "shared", "each"],
)
def test_a_chunk_of_each_request_against_float64(pairs):
    generator = torch.Generator().manual_seed(len(pairs))
    lengths, new = [150, 64, 7, 65], [30, 64, 7, 1]
    cache, table, held = cache_of(generator, lengths)
    heads = HEADS * GROUP
    query = torch.randn(sum(new) + 3, heads, DIM, generator=generator)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32) + 2
    past = torch.tensor([a - b for a, b in zip(lengths, new, strict=True)])
    output = torch.full_like(query, 7.0)
    which = (starts, past.int(), table)
    attend(output, query, cache, which, Plan("a-shape", pairs), DIM**-0.5, 0.0)
    each = pairs * heads if len(pairs) == 1 else pairs
    for row, (key, value) in enumerate(held):
        part = slice(int(starts[row]), int(starts[row + 1]))
        sink, window = zip(*each, strict=True)
        wanted = dense(query[part], key, value, past[row], sink, window)
        torch.testing.assert_close(output[part].double(), wanted, atol=1e-5, rtol=1e-5)
    assert (output[:2] == 7).all()
    assert (output[starts[-1] :] == 7).all()


def test_each_rank_takes_the_rows_of_its_heads():
    rules = [
        HeadRule(heads=[3], window=9),
        HeadRule(layers=[1], heads=[0], pattern="dense"),
    ]
    item = SparseAttention(sink=2, window=7, heads=rules, layers=[0, 1])
    second = LocalHeads(0, 2, 2, 2).plan(item)
    assert (second.pattern, second.pairs) == ("a-shape", ((2, 7), (2, 9)))
    assert LocalHeads(1, 0, 2, 2).plan(item).pairs == ((0, UNBOUNDED), (2, 7))
    assert LocalHeads(2, 0, 2, 2).plan(item) == Plan("causal")


def test_a_cache_of_other_blocks_is_refused():
    key = torch.randn(3, HEADS, DIM)
    with pytest.raises(ConfigError, match="blocks of 128 tokens"):
        cache = torch.randn(2, HEADS, 128, 2 * DIM)
        write(cache, key, key, torch.tensor([0, 1, 2]))
