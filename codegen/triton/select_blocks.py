"""Choice of key blocks on Triton: emit the kernel of a kind, import it, launch it."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Literal

from torch import Tensor, cuda

from graphopt.codegen.cache import load_python
from graphopt.codegen.triton.attention import on_device, require_runnable, supports
from graphopt.codegen.triton.emit import _Template, _template_text

Choice = Literal["mass", "best", "all"]
"""A share of the mass, a number of blocks, or every block with a real key."""

_TITLES = {
    "mass": "the heaviest, to a share of all",
    "best": "so many, the best",
    "all": "every one",
}


@cache
def emit_blocks(choice: Choice) -> str:
    """Return the source of the kernel: one Python file that imports only Triton."""
    flags = {choice.upper()}
    flags |= {"RANKED"} if choice != "all" else set()
    flags |= {"SHOWN"} if choice != "mass" else set()
    words = {"TITLE": _TITLES[choice]}
    text = _template_text("select_blocks.py.in")
    return _Template(frozenset(flags), words, (), ()).fill(text)


@cache
def load_blocks(choice: Choice) -> ModuleType:
    """Write the kernel's file to the cache directory and import it."""
    return load_python(f"choose_blocks_{choice}", emit_blocks(choice))


def launch(
    choice: Choice,
    wanted: float,
    worth: Tensor | None,
    shown: Tensor | None,
    lists: tuple[Tensor, Tensor],
    own_lists: tuple[int, ...],
    rows: range,
    sizes: tuple[int, int, int],
    block: int,
    list_block: int,
) -> None:
    """Write the lists of the row blocks ``rows`` of some heads, in one launch.

    ``worth``: float32 [B, heads, len(rows), K], for ``mass`` and ``best``; ``shown``:
    boolean [B or 1, K], whether a key block has a real key, for ``best`` and ``all``;
    ``lists``: the tensors of a `graphopt.ops.block_list.BlockList`, zeros;
    ``own_lists``: the list of each head; ``sizes``: query_len, kv_len, query_offset.
    Raises KernelError for a device that has no kernel.
    """
    require_runnable(lists[0])
    given = [t.contiguous() for t in (worth, shown) if t is not None]
    share = [] if choice == "all" else [wanted]
    grid = (len(rows), len(own_lists), lists[0].shape[0])
    with cuda.device_of(lists[0]):
        load_blocks(choice).launch(
            *given, on_device(own_lists, lists[0].device), *lists, grid, rows.start,
            *sizes, *share, block, list_block, **options(-(-sizes[1] // block)),
        )  # fmt: skip


def options(blocks: int) -> dict[str, int]:
    """Return warps for a row of so many key blocks, which lies in registers."""
    return {"num_warps": 4 if blocks <= 1024 else 8 if blocks <= 4096 else 16}


__all__ = ["Choice", "emit_blocks", "launch", "load_blocks", "options", "supports"]
