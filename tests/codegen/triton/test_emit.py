"""The text of emitted Triton kernels, for every kind of spec."""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from graphopt.codegen.predicates import PATTERNS
from graphopt.codegen.triton.emit import emit
from graphopt.codegen.triton.spec import DTYPES, AttentionSpec, chunks

DIMS = ((64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128))


def specs(sizes: tuple[tuple[int, int], ...] = DIMS) -> Iterator[AttentionSpec]:
    flags = itertools.product((False, True), repeat=3)
    for pattern, dtype, dims, own in itertools.product(PATTERNS, DTYPES, sizes, flags):
        yield AttentionSpec(pattern, dtype, *dims, 4, *own)


def digest() -> str:
    """Return the hash of the sources for two head dims, in order."""
    sources = "".join(map(emit, specs(DIMS[1:3])))
    return hashlib.sha256(sources.encode()).hexdigest()


def test_no_marker_of_the_templates_is_left():
    for spec in specs():
        source = emit(spec)
        assert not re.findall(r"^\s*%.*|@\w+@|[{}]", source, re.MULTILINE), spec
        ast.parse(source)


def test_every_name_is_defined_and_every_parameter_used():
    for spec in specs():
        function = _function(emit(spec), "attention")
        names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
        stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        loaded = {n.id for n in names if isinstance(n.ctx, ast.Load)}
        parameters = {a.arg for a in function.args.args}
        known = {"tl", "triton", "visible", "float", "GROUP", "HEAD_DIM", "VALUE_DIM"}
        assert loaded <= stored | parameters | known, spec
        assert parameters <= loaded, spec


def test_a_kernel_takes_what_its_spec_needs():
    for spec in specs():
        source = emit(spec)
        parameters = {a.arg for a in _function(source, "attention").args.args}
        assert ("mask_ptr" in parameters) == spec.has_key_mask
        assert ("cap" in parameters) == spec.has_softcap
        assert parameters >= set(spec.parameters)
        assert ("tl.load(window + head)" in source) == (
            spec.per_head and "window" in spec.parameters
        )


def test_different_specs_have_different_names():
    assert len({spec.name for spec in specs()}) == len(list(specs()))


def test_chunks_cover_a_head():
    for dim in range(1, 300):
        parts = chunks(dim)
        ends = [part.first + part.width for part in parts]
        assert [part.first for part in parts] == [0, *ends[:-1]]
        assert all(part.width in (16, 32, 64, 128, 256, 512) for part in parts)
        assert ends[-1] >= dim
        assert [part.padded for part in parts] == [end > dim for end in ends]


def test_the_text_does_not_hang_on_the_process():
    program = f"from {__name__} import digest; print(digest())"
    found = {digest()}
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        found.add(
            subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout.strip()
        )
    assert len(found) == 1


def _function(source: str, name: str) -> ast.FunctionDef:
    tree = ast.parse(source)
    return next(
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name
    )
