"""Logits of several models on Triton: emit the kernels, import and launch them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from types import ModuleType

from torch import Tensor, cuda

from graphopt.codegen.cache import load_python
from graphopt.codegen.triton.attention import require_runnable
from graphopt.codegen.triton.emit import _rule, _template_text
from graphopt.codegen.triton.spec import DTYPES

BLOCK = 1024
"""Tokens of a chunk, which is a program's; a row of 128 K tokens fills a GPU."""
OPTIONS = {"num_warps": 8, "num_stages": 1}


@cache
def emit_combine(pairs: int) -> str:
    """Return the source of the kernels: one Python file that imports only Triton."""
    lines = list(_lines(_template_text("combine.py.in"), pairs))
    source = "\n".join(lines) + "\n"
    for word, value in _words(pairs).items():
        source = source.replace(f"@{word}@", value)
    return source


def _lines(text: str, pairs: int) -> Iterator[str]:
    """Repeat runs of lines that begin with ``%pair|`` for each pair."""
    rules = (_rule(line) for line in text.splitlines())
    kept = ("", "some" if pairs else "none")
    for rule, group in groupby(rules, key=lambda r: r[0]):
        bodies = [body for _, body in group]
        if rule == "pair":
            yield from (b.replace("{i}", str(i)) for i in range(pairs) for b in bodies)
        elif rule in kept:
            yield from bodies


def _words(pairs: int) -> dict[str, str]:
    names = ["base", *(f"{n}_{i}" for i in range(pairs) for n in _PAIR)]
    strides = [f"{name}_stride" for name in names]
    members = [f"{name}_{part}" for name in names for part in ("ptr", "stride")]
    return {
        "PAIRS": str(pairs),
        "MEMBERS": ", ".join(members),
        "STRIDE_NAMES": ", ".join(f'"{s}"' for s in strides),
        # Terms are added to one another first: the order of two pairs changes no bit.
        "TERMS": " + ".join(f"term_{i}" for i in range(pairs)),
    }


_PAIR = ("tuned", "reference")


@cache
def load_combine(pairs: int) -> ModuleType:
    """Write the kernels' file to the cache directory and import it."""
    return load_python("combine", emit_combine(pairs))


def combines(members: Sequence[Tensor]) -> bool:
    """Tell whether the kernels take logits like these."""
    return all(m.dtype in DTYPES for m in members)


def combine_sample(
    members: Sequence[Tensor],
    factors: Tensor,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    of_base: bool = False,
) -> Tensor:
    """Return a token of each row, int64 [B]; no synchronisation, no atomics.

    members: the base [B, V], then tuned and reference of each pair; factors float32
    [P]; the rest as in `graphopt.ops.logits`. Raises KernelError for a device that has
    no kernel.
    """
    base = members[0]
    require_runnable(base)
    rows = [m if m.stride(-1) == 1 else m.contiguous() for m in members]
    heat = factors.new_ones(()) if temperature is None else temperature.float()
    share = None if top_p is None else top_p.float()
    numbers = None if uniform is None else uniform.float().contiguous()
    with cuda.device_of(base):
        return load_combine(len(members) // 2).launch(
            rows, factors, numbers, heat, share, of_base, BLOCK, **OPTIONS
        )


__all__ = ["combine_sample", "combines", "emit_combine", "load_combine"]
