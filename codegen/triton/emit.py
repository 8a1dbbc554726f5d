"""Print the source of an attention kernel from its two templates.

``attention.py.in`` is the file; ``tile.py.in`` is the loop over tiles and is used
twice: for tiles that every row of a block sees whole, and for tiles tested by element.

A template line is kept as it is, or starts with ``%`` and a word:
``%if FLAG|`` keeps the line when the spec has FLAG; ``%head|`` and ``%value|`` repeat
it for each chunk of the head dim and the value dim with ``{i}``, ``{first}``,
``{width}`` filled in (``%first|`` and ``%rest|``: for the first and the later head
chunks); ``%head+|`` and ``%value+|`` only for chunks whose load has a mask.
``@NAME@`` stands for a text of the whole kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from textwrap import indent
from typing import Any

import sympy

from graphopt.codegen.predicates import BLOCK, key_runs
from graphopt.codegen.printers import to_triton
from graphopt.codegen.triton.bounds import print_bounds, print_start
from graphopt.codegen.triton.spec import DTYPES, AttentionSpec, chunks

# Kinds of tiles whose keys are tested one by one.
_TESTED = ("partial", "gather")


@cache
def emit(spec: AttentionSpec) -> str:
    """Return the source of the kernel: one Python file that imports only Triton."""
    source = _expand("attention.py.in", spec, "")
    parts = _visit_parts(spec) if spec.is_visit else _static_parts(spec)
    for name, text in parts.items():
        source = source.replace(f"%{name}\n", text)
    return source


def _static_parts(spec: AttentionSpec) -> dict[str, str]:
    bounds = print_bounds(key_runs(spec.predicate))
    starts = {
        kind: print_start(kind, sections)
        for kind, sections in (("full", bounds.full), ("partial", bounds.partial))
    }
    return {
        "bounds": "".join(f"    {line}".rstrip() + "\n" for line in bounds.lines),
        **{kind: _expand("tile.py.in", spec, kind, s) for kind, s in starts.items()},
    }


def _visit_parts(spec: AttentionSpec) -> dict[str, str]:
    """The loops over a run's tiles stand inside the loop over runs."""
    starts = {
        "full": "        start = begin + tile * BLOCK_N",
        "partial": "        start = full_end + tile * BLOCK_N",
        "gather": _template_text("gather.py.in").rstrip("\n"),
    }
    loops = _expand("visit.py.in", spec, "")
    for kind, start in starts.items():
        text = _expand("tile.py.in", spec, kind, start)
        inner = text if kind == "gather" else indent(text, "    ")
        loops = loops.replace(f"%{kind}\n", inner)
    return {"bounds": loops, "full": "", "partial": ""}


def _template_text(name: str) -> str:
    return files("graphopt.codegen.triton").joinpath(name).read_text()


@dataclass(frozen=True)
class _Template:
    """What the lines of a template are filled with."""

    flags: frozenset[str]
    words: Mapping[str, str]
    head: tuple[dict[str, Any], ...]
    value: tuple[dict[str, Any], ...]

    def fill(self, text: str) -> str:
        """Return the template's text for this kernel."""
        rules = (_rule(line) for line in text.splitlines())
        groups = groupby(rules, key=lambda rule: rule[0].rstrip("+"))
        lines = (line for rule, group in groups for line in self._lines(rule, [*group]))
        source = "\n".join(lines) + "\n"
        for word, value in self.words.items():
            source = source.replace(f"@{word}@", value)
        return source

    def _lines(self, rule: str, group: list[tuple[str, str]]) -> Iterator[str]:
        if rule.startswith("if ") or not rule:
            kept = not rule or rule[3:] in self.flags
            yield from (body for _, body in group if kept)
            return
        for part in self._parts(rule):
            for own, body in group:
                if part["mask"] or not own.endswith("+"):
                    yield body.format(**part)

    def _parts(self, rule: str) -> tuple[dict[str, Any], ...]:
        if rule in ("first", "rest"):
            return self.head[:1] if rule == "first" else self.head[1:]
        return self.head if rule == "head" else self.value


def _rule(line: str) -> tuple[str, str]:
    """Split a template line into its rule, empty for a plain line, and its body."""
    if not line.startswith("%") or "|" not in line:
        return "", line
    rule, body = line[1:].split("|", 1)
    return rule, body


def _expand(name: str, spec: AttentionSpec, kind: str, start: str = "") -> str:
    text = _template_text(name)
    words = _words(spec, kind) | {"START": start}
    template = _Template(
        _flags(spec, kind),
        words,
        tuple(_chunk_words(spec.head_dim, "d", "HEAD_DIM", "inside[None, :]", kind)),
        tuple(_chunk_words(spec.value_dim, "e", "VALUE_DIM", "inside[:, None]", kind)),
    )
    return template.fill(text)


def _chunk_words(
    dim: int, axis: str, limit: str, inside: str, kind: str
) -> Iterator[dict[str, Any]]:
    """Yield the words of each chunk; keys are transposed, so their axis comes first."""
    for i, chunk in enumerate(chunks(dim)):
        beyond = f"({axis}_{i} < {limit})" if chunk.padded else ""
        side = "[:, None]" if axis == "d" else "[None, :]"
        terms = [inside] if kind in _TESTED else []
        terms += [beyond + side] if beyond else []
        yield {
            "i": i,
            "width": chunk.width,
            "first": f"{chunk.first} + " if chunk.first else "",
            "mask": " & ".join(terms),
            "and_row": f" & {beyond}[None, :]" if beyond else "",
        }


def _flags(spec: AttentionSpec, kind: str) -> frozenset[str]:
    partial = kind in _TESTED
    flags = {"PARTIAL" if partial else kind.upper()}
    flags.add("SOFTCAP" if spec.has_softcap else "NO_SOFTCAP")
    flags |= {"gather": {"GATHER"}, "partial": {"EDGE"}}.get(kind, set())
    flags |= {"VISIT"} if spec.is_visit else set()
    flags.add("BLOCKS" if spec.block else "NO_BLOCKS")
    flags |= {"TABLE_DENSE_ROWS"} if spec.is_visit and spec.per_head else set()
    for name in map(str.upper, spec.parameters):
        flags |= {name, f"TABLE_{name}"} if spec.per_head else {name}
    layout = "PACKED" if spec.packed else "ROWS"
    flags.add(layout)
    if spec.has_key_mask:
        flags |= {"KEY_MASK", "PARTIAL_MASK" if partial else "FULL_MASK"}
        flags.add(f"{layout}_MASK")
    if partial or spec.has_key_mask:
        flags.add("SEEN")
    return frozenset(flags)


def _words(spec: AttentionSpec, kind: str) -> dict[str, str]:
    expr = spec.predicate.expr
    lengths = [] if spec.packed else ["query_len", "kv_len"]
    unspecialized = [*spec.parameters, *lengths, "query_offset"]
    if spec.is_visit:
        unspecialized += ["run_capacity", "column_capacity", "dense_rows"]
    if spec.block:
        unspecialized += ["block_lists", "row_blocks", "block_capacity"]
    if spec.per_head:
        tables = (*spec.parameters, "dense_rows")
        unspecialized = [name for name in unspecialized if name not in tables]
    single = DTYPES[spec.dtype] == "fp32"
    return {
        "PATTERN": spec.pattern,
        # Every key, broadcast like the other predicates.
        "PREDICATE": "k >= 0" if expr == sympy.true else to_triton(expr),
        "DTYPE": DTYPES[spec.dtype],
        "HEAD_DIM": str(spec.head_dim),
        "VALUE_DIM": str(spec.value_dim),
        "GROUP": str(spec.group),
        "KIND": kind,
        "OUT_STRIDE": "out_stride_m" if spec.packed else "VALUE_DIM",
        "LIST_BLOCK": str(BLOCK),
        "KEY_BLOCK": str(spec.block),
        # Gathered keys have no order: 64-bit offsets of their own.
        "COLUMN": "k.to(tl.int64)" if kind == "gather" else "column",
        "VISIBLE_PARAMETERS": ", ".join(["q", "k", *spec.parameters]),
        "VISIBLE_ARGUMENTS": ", ".join(["q[:, None]", "k[None, :]", *spec.parameters]),
        "UNSPECIALIZED": ", ".join(f'"{name}"' for name in unspecialized),
        "TABLE_TYPE": "torch.Tensor" if spec.per_head else "int",
        # Exact products in fp32; the default rounds operands to tf32.
        "PRECISION": ', input_precision="ieee"' if single else "",
    }
