"""Print the source of the kernels on pages from their templates.

Templates are those of `graphopt.codegen.triton.emit`: ``%if FLAG|`` keeps a line when
the spec has FLAG, ``@NAME@`` stands for a text. The kernels of attention have a file
each and end in one source.
"""

from __future__ import annotations

from functools import cache

from graphopt.codegen.pages import LOGICAL, PAGE, SPREAD
from graphopt.codegen.triton.emit import _Template, _template_text
from graphopt.codegen.triton.pages_spec import (
    AppendSpec,
    PageAttentionSpec,
    PageSpec,
    padded,
)

_ATTENTION = ("head", "score", "choose", "attend", "merge", "launch")


@cache
def emit_append(spec: AppendSpec) -> str:
    """Return the source of the kernel: one Python file that imports only Triton."""
    flags = spec.flags()
    if spec.has_statistics:
        flags |= {"JUDGED", *(f"JUDGED_{flag}" for flag in flags)}
        flags.add("JUDGED_EXTREMES" if spec.extremes else "JUDGED_SPREAD")
    kept = "low, high" if spec.kind == "int4" else "keys"
    words = {"KEPT": kept if spec.has_statistics else "_", "SPREAD": str(SPREAD)}
    names = ("pages_store.py.in", "pages_append.py.in")
    return "\n\n".join(_filled(name, spec, flags, words) for name in names)


@cache
def emit_append_ragged(spec: AppendSpec) -> str:
    """Return the source of the kernel: one Python file that imports only Triton."""
    names = ("pages_store.py.in", "ragged_append.py.in")
    return "\n\n".join(_filled(name, spec, spec.flags(), {}) for name in names)


@cache
def emit_page_attention(spec: PageAttentionSpec) -> str:
    """Return the source of the four kernels: one file that imports only Triton."""
    flags = spec.flags() | {"SOFTCAP" if spec.has_softcap else "NO_SOFTCAP"}
    flags.add("KEY_MASK" if spec.has_key_mask else "NO_KEY_MASK")
    flags |= {f"{flag}_CODES" for flag in flags if spec.kind}
    single = spec.words()["DTYPE"] == "fp32"
    words = {
        "OUT_WIDTH": str(padded(spec.value_dim)),
        "GROUP": str(spec.group),
        "ROWS": str(padded(spec.group)),
        "HEAD_WIDTH": str(padded(spec.head_dim)),
        # Exact products in fp32; the default rounds operands to tf32.
        "PRECISION": ', input_precision="ieee"' if single else "",
    }
    names = (f"pages_{part}.py.in" for part in _ATTENTION)
    return "\n\n".join(_filled(name, spec, flags, words) for name in names)


def _filled(name: str, spec: PageSpec, flags: set[str], words: dict[str, str]) -> str:
    sizes = {"PAGE": str(PAGE), "LOGICAL": str(LOGICAL)}
    given = spec.words() | sizes | words
    return _Template(frozenset(flags), given, (), ()).fill(_template_text(name))
