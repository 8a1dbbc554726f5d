"""Every kernel on several threads finds what it finds on one.

Other tests run on one thread, which is all that test processes have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from graphopt.ops import attention
from graphopt.ops.block_selection import select_blocks
from graphopt.ops.packed import packed_attention
from graphopt.ops.selection import select_vertical_slash
from graphopt.ops.visit import visit_attention
from tests.models import padding_mask
from tests.ops import test_packed as prompts
from tests.ops.int8 import test_linear as int8
from tests.ops.pages import Layer
from tests.oracle import tensors

THREADS = (1, 2, 3)
Found = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attended() -> Found:
    """A pattern of the predicate, tables of selections, and both kinds of lists."""
    q, k, v = tensors(4, 2, 300, 400, 64, batch=2)
    shown = padding_mask([400, 250], 400).bool()
    slashes = select_vertical_slash(q, k, shown, [2], [9], [9], [60], 100)
    blocks = select_blocks(q, k, shown, [2, 0, 0, 3], [0, 8, 16, 0], [0.7], 64, 100)
    return (
        attention(q, k, v, shown, "a-shape", [5], [70], 100),
        *slashes,
        visit_attention(q, k, v, shown, slashes, query_offset=100),
        *blocks[:2],
    )


def packed() -> Found:
    return (packed_attention(*prompts.case()[1], "causal", [0], [0], 0.3, 0.0),)


def paged(rings: tuple[int, ...] = (1,)) -> Found:
    """Appended, selected and attended; splits go by the number of threads."""
    layer, ops = Layer(rings=rings, pages=12), torch.ops.graphopt
    for seed, new in enumerate((500, 70, 1)):
        layer.append(new, ops.append_pages, seed)
    query = torch.randn(2, 6, 1, 32, generator=torch.Generator().manual_seed(5))
    held = (*layer.held(), *layer.state())
    out = ops.page_attention(query, *held, None, 4, 1)
    if rings:  # which do not keep what is to be read
        return (out, layer.selected)
    return (out, layer.selected, *ops.read_pages(*held, 571, torch.float32))


def paged_wholly() -> Found:
    return paged(())


def shadowed() -> Found:
    x, weight, bias = int8.operands(70, 96, 33, beyond=3)
    return (int8.run(x, weight, bias, int8.settings(x, True)),)


@torch.no_grad()
@pytest.mark.parametrize("case", [attended, packed, paged, paged_wholly, shadowed])
def test_the_same_on_any_number(case: Callable[[], Found]) -> None:
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(case())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
