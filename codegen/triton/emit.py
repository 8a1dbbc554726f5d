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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

import sympy

from graphopt.codegen.predicates import key_runs
from graphopt.codegen.printers import to_triton
from graphopt.codegen.triton.bounds import Section, print_bounds, print_start
from graphopt.codegen.triton.spec import DTYPES, AttentionSpec, chunks


@cache
def emit(spec: AttentionSpec) -> str:
    """Return the source of the kernel: one Python file that imports only Triton."""
    bounds = print_bounds(key_runs(spec.predicate))
    source = _expand("attention.py.in", spec, "")
    parts = {
        "bounds": "".join(f"    {line}".rstrip() + "\n" for line in bounds.lines),
        "full": _expand("tile.py.in", spec, "full", bounds.full),
        "partial": _expand("tile.py.in", spec, "partial", bounds.partial),
    }
    for name, text in parts.items():
        source = source.replace(f"%{name}\n", text)
    return source


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


def _expand(
    name: str, spec: AttentionSpec, kind: str, sections: Sequence[Section] = ()
) -> str:
    text = files("graphopt.codegen.triton").joinpath(name).read_text()
    words = _words(spec, kind) | {"START": print_start(kind, sections)}
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
        terms = [inside] if kind == "partial" else []
        terms += [beyond + side] if beyond else []
        yield {
            "i": i,
            "width": chunk.width,
            "first": f"{chunk.first} + " if chunk.first else "",
            "mask": " & ".join(terms),
            "and_row": f" & {beyond}[None, :]" if beyond else "",
        }


def _flags(spec: AttentionSpec, kind: str) -> frozenset[str]:
    partial = kind == "partial"
    flags = {kind.upper(), "SOFTCAP" if spec.has_softcap else "NO_SOFTCAP"}
    for name in map(str.upper, spec.parameters):
        flags |= {name, f"TABLE_{name}"} if spec.per_head else {name}
    if spec.has_key_mask:
        flags |= {"KEY_MASK", "PARTIAL_MASK" if partial else "FULL_MASK"}
    if partial or spec.has_key_mask:
        flags.add("SEEN")
    return frozenset(flags)


def _words(spec: AttentionSpec, kind: str) -> dict[str, str]:
    expr = spec.predicate.expr
    unspecialized = [*spec.parameters, "query_len", "kv_len", "query_offset"]
    if spec.per_head:
        unspecialized = unspecialized[len(spec.parameters) :]
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
        "VISIBLE_PARAMETERS": ", ".join(["q", "k", *spec.parameters]),
        "VISIBLE_ARGUMENTS": ", ".join(["q[:, None]", "k[None, :]", *spec.parameters]),
        "UNSPECIALIZED": ", ".join(f'"{name}"' for name in unspecialized),
        "TABLE_TYPE": "torch.Tensor" if spec.per_head else "int",
        # Exact products in fp32; the default rounds operands to tf32.
        "PRECISION": ', input_precision="ieee"' if single else "",
    }
