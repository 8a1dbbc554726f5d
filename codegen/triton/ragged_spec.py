"""What distinguishes one emitted kernel of ragged batches on pages from another."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from graphopt.codegen.predicates import Predicate, predicate
from graphopt.codegen.printers import to_triton
from graphopt.codegen.triton.pages_spec import PageSpec, padded

LEAST_KEYS = 256  # that a part of a tile has


@dataclass(frozen=True)
class RaggedSpec(PageSpec):
    """A kernel in which rows of a ragged batch attend to their pages."""

    pattern: str = "causal"
    group: int = 1
    """Query heads per KV head."""
    stacked: int = 1
    """Query heads of a program: a group, or one where a group has several patterns."""
    has_softcap: bool = False
    per_head: bool = False
    """Sink and window are int32 tables, one value a program's heads."""

    @property
    def predicate(self) -> Predicate:
        """Return the pattern's predicate."""
        return predicate(self.pattern)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Return which of ``sink`` and ``window`` the kernel takes."""
        return tuple(str(symbol.name) for symbol in self.predicate.parameters)

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        own = (("softcap", self.has_softcap), ("heads", self.per_head))
        heads = f"g{self.group}" + f"s{self.stacked}" * (self.stacked != self.group)
        flags = [flag for flag, on in own if on]
        pattern = self.pattern.replace("-", "_")
        return "_".join(["ragged", pattern, self.dims, heads, *flags])

    def flags(self) -> set[str]:
        """Return which lines of the templates are kept."""
        flags = super().flags() | {"SOFTCAP" if self.has_softcap else "NO_SOFTCAP"}
        for name in map(str.upper, self.parameters):
            flags |= {name, f"TABLE_{name}"} if self.per_head else {name}
        return flags

    def words(self) -> dict[str, str]:
        """Return the texts that the templates are filled with."""
        expr = self.predicate.expr
        lengths = ["tokens", "rows", "steps", "pages", "width"]
        splits = ["row_splits", "tile_splits"]
        unspecialized = [*([] if self.per_head else self.parameters), *lengths, *splits]
        own = super().words()
        return own | {
            "PATTERN": self.pattern,
            # Every key, broadcast like the other predicates.
            "PREDICATE": "k >= 0" if expr == sympy.true else to_triton(expr),
            "GROUP": str(self.group),
            "STACKED": str(self.stacked),
            "LEAST_KEYS": str(LEAST_KEYS),
            "OUT_WIDTH": str(padded(self.value_dim)),
            "VISIBLE_PARAMETERS": ", ".join(["q", "k", *self.parameters]),
            "VISIBLE_ARGUMENTS": ", ".join(
                ["q[:, None]", "k[None, :]", *self.parameters]
            ),
            "UNSPECIALIZED": "\n".join(f'        "{name}",' for name in unspecialized),
            "TABLE_TYPE": "torch.Tensor" if self.per_head else "int",
            # Exact products in fp32; the default rounds operands to tf32.
            "PRECISION": ', input_precision="ieee"' if own["DTYPE"] == "fp32" else "",
        }

    def tile_flags(self, kind: str) -> set[str]:
        """Return further flags of the loop over ``full`` or ``partial`` tiles."""
        upper = kind.upper()
        own = self.flags() & {"CODES", "INT4"}
        masked = {f"{name}_MASKED" for name, mask in self.inside(kind).items() if mask}
        return {upper, *(f"{upper}_{flag}" for flag in own), *masked}

    def inside(self, kind: str) -> dict[str, str]:
        """Return the masks of loads of keys [D, N] and values [N, Dv], if any."""
        key = ["held[None, :]"] if kind == "partial" else []
        value = ["held[:, None]"] if kind == "partial" else []
        if padded(self.key_stored) != self.key_stored:
            key.append("(d < KEY_STORED)[:, None]")
        if padded(self.value_stored) != self.value_stored:
            value.append("(e < VALUE_STORED)[None, :]")
        return {"KEY": " & ".join(key), "VALUE": " & ".join(value)}
