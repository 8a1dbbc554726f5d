"""Print the source of the kernels of ragged batches on pages from their templates.

Templates are those of `graphopt.codegen.triton.emit`; ``ragged_tile.py.in`` is the loop
over tiles and is used twice: for tiles that every row sees whole, and for tiles tested
by element.
"""

from __future__ import annotations

from functools import cache

from graphopt.codegen.predicates import key_runs
from graphopt.codegen.triton.bounds import print_bounds, print_start
from graphopt.codegen.triton.pages_emit import _filled
from graphopt.codegen.triton.ragged_spec import RaggedSpec


@cache
def emit_ragged(spec: RaggedSpec) -> str:
    """Return the source of the kernels: one Python file that imports only Triton."""
    bounds = print_bounds(key_runs(spec.predicate))
    source = _filled("ragged.py.in", spec, spec.flags(), {})
    lines = "".join(f"    {line}".rstrip() + "\n" for line in bounds.lines)
    source = source.replace("%bounds\n", lines)
    for kind, sections in (("full", bounds.full), ("partial", bounds.partial)):
        start = print_start(kind, sections)
        source = source.replace(f"%{kind}\n", _tile(spec, kind, start))
    return source + "\n\n" + _filled("ragged_merge.py.in", spec, spec.flags(), {})


def _tile(spec: RaggedSpec, kind: str, start: str) -> str:
    inside = {f"{name}_INSIDE": mask for name, mask in spec.inside(kind).items()}
    words = {"KIND": kind, "START": start, **inside}
    return _filled(
        "ragged_tile.py.in", spec, spec.flags() | spec.tile_flags(kind), words
    )
