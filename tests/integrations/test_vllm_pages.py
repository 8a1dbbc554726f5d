"""Pages of vLLM's cache are chosen as those of a cache of a request's own."""

from __future__ import annotations

import pytest
import torch

from graphopt import ops as _ops  # noqa: F401  registers the operators
from graphopt.integrations.vllm.bounds import Parts
from graphopt.integrations.vllm.heads import LocalHeads
from graphopt.integrations.vllm.paged import write
from graphopt.integrations.vllm.selection import Selection
from graphopt.ops.pages import append_reference, page_attention_reference
from graphopt.passes.attention.page_selection import PageSelection

PAGE, HEADS, GROUP, DIM, ROOM = 64, 2, 2, 32, 8
SCALE = DIM**-0.5


class Alone:
    """A request with pools of its own, by the references of graphopt's operators."""

    def __init__(self, item, rings):
        self.item, self.past = item, torch.zeros(1, dtype=torch.int32)
        self.table = torch.arange(ROOM, dtype=torch.int32)[None]
        shape = (HEADS, ROOM, PAGE, DIM)
        self.pools = [torch.zeros(shape) for _ in range(2)]
        full = HEADS - len(rings)
        self.statistics = torch.zeros(full, ROOM, PAGE // 16, 2, DIM)
        self.selected = torch.full((1, full, ROOM), -1, dtype=torch.int32)
        self.at = torch.full((1, full), -1, dtype=torch.int32)
        self.rings = rings
        self.full = [h for h in range(HEADS) if h not in rings]

    def write(self, key, value):
        """Append [N, H, D]."""
        extremes = self.item.statistics == "extremes"
        for heads, statistics in ((self.full, self.statistics), (self.rings, None)):
            if heads:
                pools = [pool[heads] for pool in self.pools]
                new = [x[:, heads].transpose(0, 1)[None] for x in (key, value)]
                kept = (*pools, None, None, statistics, 0, 0, extremes)
                append_reference(*new, self.past, self.table, *kept)
                for pool, part in zip(self.pools, pools, strict=True):
                    pool[heads] = part

    def attend(self, query):
        """Return attention of query [Hq, D] behind one new token."""
        full, ring = ([p[h] for p in self.pools] for h in (self.full, self.rings))
        streaming = (*ring, None, None, self.table) if self.rings else (None,) * 5
        sizes = (self.item.sink // PAGE, self.item.local // PAGE + 1)
        held = (*full, None, None, self.table, *streaming, self.rings, *sizes)
        state = (self.statistics, self.selected, self.at, None)
        asked = (self.item.budget // PAGE, self.item.interval, SCALE, 0.0)
        return page_attention_reference(
            query[None, :, None], *held, self.past, 1, *state, *asked
        )[0, :, 0]


class Served:
    """Requests whose blocks lie anywhere in one cache of vLLM's layout."""

    def __init__(self, item, rings, generator):
        self.selection, self.generator = Selection(item, rings), generator
        self.cache = torch.randn(24, HEADS, PAGE, 2 * DIM, generator=generator)
        self.free = torch.randperm(24, generator=generator).tolist()
        self.blocks, self.alone, self.item = {}, {}, item

    def add(self, name):
        self.blocks[name] = []
        self.alone[name] = Alone(self.item, self.selection.rings)

    def end(self, name):
        self.free = self.blocks.pop(name) + self.free  # the next request's are these

    def step(self, new, decodes):
        """Write ``new`` tokens of each request, the first ``decodes`` of one each.

        Returns what decodes attend to, and what they would by themselves.
        """
        names = list(new)
        past = torch.cat([self.alone[n].past for n in names])
        starts = torch.tensor([0, *new.values()]).cumsum(0).int()
        key, value, query = (
            torch.randn(int(starts[-1]), h, DIM, generator=self.generator)
            for h in (HEADS, HEADS, HEADS * GROUP)
        )
        for name, length in new.items():
            while len(self.blocks[name]) * PAGE < self.alone[name].past + length:
                self.blocks[name].append(self.free.pop(0))
        table = torch.zeros(len(names), ROOM, dtype=torch.int32)
        slots, wanted = [], []
        for row, name in enumerate(names):
            held, alone = torch.tensor(self.blocks[name]), self.alone[name]
            table[row, : len(held)] = held
            at = alone.past + torch.arange(new[name])
            slots.append(held[at // PAGE] * PAGE + at % PAGE)
            part = slice(int(starts[row]), int(starts[row + 1]))
            alone.write(key[part], value[part])
            if row < decodes:
                wanted.append(alone.attend(query[part][0]))
            alone.past += new[name]
        write(self.cache, key, value, torch.cat(slots))
        rows = [
            (starts[a : b + 1], past[a:b], table[a:b])
            for a, b in ((0, decodes), (decodes, len(names)))
        ]
        parts = Parts.of(starts, past, table)
        self.selection.write(self.cache, parts, rows[1])
        found = torch.full_like(query, 7.0)
        self.selection.attend(found, query, self.cache, rows[0], SCALE, 0.0)
        assert (found[decodes:] == 7).all()
        return found[:decodes], wanted

    def skipped(self, name):
        """Tell whether heads of the request left pages out."""
        chosen = (self.alone[name].selected >= 0).sum(-1)
        return bool((chosen < len(self.blocks[name])).all())


@pytest.mark.parametrize(
    ("statistics", "interval", "rings"),
    [("spread", 1, []), ("extremes", 4, [1]), ("spread", 7, [])],
)
def test_requests_that_come_and_go(statistics, interval, rings):
    """Blocks go from request to request, and choices over the ends of pages."""
    item = PageSelection(
        budget=192, interval=interval, statistics=statistics, sink=64, local=64
    )
    served = Served(item, rings, torch.Generator().manual_seed(interval))
    served.add("a")
    served.add("b")
    served.step({"a": 300, "b": 100}, 0)
    served.step({"b": 150}, 0)  # the second chunk of a prompt
    for length in range(24):  # over the ends of pages: 320 and 256
        (*found,), wanted = served.step({"a": 1, "b": 1}, 2)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        if length == 9:
            served.step({"a": 1, "b": 29}, 1)  # as if it had been read anew
            served.alone["b"].at.fill_(-1)
    assert served.skipped("a")
    assert served.skipped("b")
    served.end("a")
    served.add("c")
    served.step({"b": 1, "c": 260}, 1)
    for _ in range(9):
        (*found,), wanted = served.step({"b": 1, "c": 1}, 2)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_each_rank_takes_the_streaming_heads_that_are_its_own(tmp_path):
    (tmp_path / "gates.tsv").write_text("0.9\t0.1\n0.2\t0.8\n")
    item = PageSelection(table=str(tmp_path / "gates.tsv"), sparsity=0.5)
    assert LocalHeads(0, 0, 4, 2).rings(item) == [1]
    assert LocalHeads(0, 2, 2, 2).rings(item) == [0]
    assert LocalHeads(0, 3, 1, 2).rings(item) == [0]  # two ranks have the same KV head
    assert LocalHeads(1, 2, 2, 2).rings(item) == []


def test_a_choice_fits_a_table_of_any_width():
    """A short request in a cache of long choices."""
    served = Served(PageSelection(budget=4096), [], torch.Generator().manual_seed(1))
    served.add("a")
    served.step({"a": 70}, 0)
    (*found,), wanted = served.step({"a": 1}, 1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
