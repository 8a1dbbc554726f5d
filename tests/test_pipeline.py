"""The pipeline: undo, strict mode, verification, expectations, remarks."""

from __future__ import annotations

import functools
import runpy
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from graphopt.config import PassConfig, load_config
from graphopt.errors import PassError
from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.match import op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.text import graph_text
from graphopt.passes.base import Pass, PassResult
from graphopt.pipeline import PipelineOptions, run_passes
from tests.models import (
    CAUSAL,
    TINY,
    capture,
    copy_graph,
    padding_mask,
    token_ids,
)

EXACT = "sparse-attention{sink=0,window=4096,force=true}"
A_SHAPE = "sparse-attention{sink=4,window=8,force=true}"
SLASH = (
    "sparse-attention{pattern=vertical-slash,sink=2,window=4,vertical=3,slash=5,"
    "force=true}"
)


@dataclass(frozen=True, kw_only=True)
class Raises(Pass):
    name: ClassVar[str] = "raises"

    def run(self, model, context):
        graph = model.gm.graph
        graph.erase_node(next(n for n in reversed(graph.nodes) if not n.users).prev)
        raise RuntimeError("half-way")


@dataclass(frozen=True, kw_only=True)
class Lies(Pass):
    """Inserts a node whose claimed shape is not the one it computes."""

    name: ClassVar[str] = "lies"

    def run(self, model, context):
        site = model.attention[0]
        with model.gm.graph.inserting_after(site.node):
            wrong = model.gm.graph.call_function(torch.neg, (site.key,))
        wrong.meta["example_value"] = site.node.meta["example_value"]
        site.node.replace_all_uses_with(wrong)
        return PassResult(True)


@dataclass(frozen=True, kw_only=True)
class Nothing(Pass):
    name: ClassVar[str] = "nothing"

    def run(self, model, context):
        return PassResult(False)


@functools.cache
def captured():
    return capture(TINY["llama"](), input_ids=token_ids(1, 20))[0]


def llama():
    return copy_graph(captured())


@pytest.mark.parametrize("broken", [Raises, Lies])
def test_a_broken_pass_is_undone(broken):
    gm = llama()
    before = graph_text(gm)
    record = run_passes(gm, [broken()])[0]
    assert graph_text(gm) == before
    assert not record.changed
    assert [(r.kind, r.code) for r in record.remarks] == [("failure", "undone")]
    gm.recompile()
    gm(*gm.meta["arguments"])


def test_a_graph_that_a_pass_was_undone_on_compiles():
    model, ids = TINY["gpt2"]().eval(), token_ids(3, 7)
    options = {"config": PassConfig((Lies(),))}
    fast = torch.compile(model, backend="graphopt", options=options, dynamic=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="undone"):
        torch.testing.assert_close(fast(ids).logits, model(ids).logits)


@pytest.mark.parametrize("broken", [Raises, Lies])
def test_strict_raises_and_leaves_the_graph(broken):
    gm = llama()
    before = graph_text(gm)
    with pytest.raises(PassError, match=broken.name):
        run_passes(gm, [broken()], PipelineOptions(strict=True))
    assert graph_text(gm) == before


def test_no_match_is_reported():
    record = run_passes(llama(), [Nothing()])[0]
    assert [r.code for r in record.remarks] == ["no-sites"]


@pytest.mark.parametrize(("expect", "failures"), [(2, 0), (3, 1)])
def test_expect(expect, failures):
    passes = load_config(A_SHAPE[:-1] + f",expect={expect}}}").pipeline
    record = run_passes(llama(), passes)[0]
    assert sum(r.code == "expect" for r in record.remarks) == failures
    if failures:
        with pytest.raises(PassError, match="expected 3 rewritten sites, got 2"):
            run_passes(llama(), passes, PipelineOptions(strict=True))


def test_layers_out_of_range():
    config = load_config("sparse-attention{layers=[0, 7]}")
    remarks = run_passes(llama(), config.pipeline)[0].remarks
    assert [r.code for r in remarks] == ["out-of-range"]
    assert "names 7; the model has 2" in remarks[0].message
    with pytest.raises(PassError, match="names 7; the model has 2"):
        run_passes(llama(), config.pipeline, PipelineOptions(strict=True))


@functools.cache
def padded(name, cached):
    """The graph of a padded batch, and its arguments with padding on either side."""
    left, right = (padding_mask([24, 13, 1], 24, side) for side in ("left", "right"))
    inputs = {"input_ids": token_ids(3, 24), "attention_mask": left}
    gm = capture(TINY[name](), **inputs, use_cache=cached)[0]
    given = gm.meta["arguments"]
    same = [isinstance(a, torch.Tensor) and torch.equal(a, left) for a in given]
    assert sum(same) == 1
    other = [right if is_mask else a for a, is_mask in zip(given, same, strict=True)]
    return gm, (given, other)


@pytest.mark.parametrize("name", CAUSAL)
def test_idempotent(name):
    for config in (A_SHAPE, SLASH, "structured-mask"):
        gm = copy_graph(padded(name, True)[0])
        passes = load_config(config).pipeline
        run_passes(gm, passes)
        once = graph_text(gm)
        run_passes(gm, passes)
        assert graph_text(gm) == once


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_the_exact_setting_is_bit_for_bit(name):
    gm = capture(TINY[name](), input_ids=token_ids(1, 50), use_cache=True)[0]
    with torch.no_grad():
        expected = gm(*gm.meta["arguments"])
        record = run_passes(gm, load_config(EXACT).pipeline)[0]
        gm.recompile()
        actual = gm(*gm.meta["arguments"])
    assert record.changed
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "cached"), [*((n, True) for n in CAUSAL), ("llama", False)]
)
def test_lossless_on_padded_batches(name, cached):
    graph, calls = padded(name, cached)
    gm = copy_graph(graph)
    expected = [gm(*arguments) for arguments in calls]
    run_passes(gm, load_config(None).pipeline, PipelineOptions(strict=True))
    gm.recompile()
    for arguments, wanted in zip(calls, expected, strict=True):
        for one, other in zip(wanted, gm(*arguments), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def test_a_heads_table():
    rule = "heads=[{heads=[1, 3], pattern=dense}, {layers=[1], sink=8}]"
    gm = llama()
    text = f"sparse-attention{{sink=4,window=8,force=true,{rule}}}"
    run_passes(gm, load_config(text).pipeline)
    nodes = [n for n in gm.graph.nodes if op_name(n) == "graphopt.attention"]
    dense = 2**31 - 1
    assert [n.args[5:7] for n in nodes] == [
        ([4, 0, 4, 0], [8, dense, 8, dense]),
        ([8, 0, 8, 0], [8, dense, 8, dense]),
    ]


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_reproducer_repeats_the_failure(tmp_path, monkeypatch, dynamic):
    gm = capture(
        TINY["gpt2"](), dynamic=dynamic, input_ids=token_ids(1, 20), use_cache=True
    )[0]
    fold_float_attributes(gm)
    passes = load_config("sparse-attention{layers=[0],window=8,force=true}").pipeline
    broken = type("Broken", (type(passes[0]),), {"run": _fails})(
        layers=[0], window=8, force=True
    )
    options = PipelineOptions(reproducers=tmp_path)
    remark = run_passes(gm, [broken], options)[0].remarks[0]
    path = next(tmp_path.glob("sparse-attention-*.py"))
    assert str(path) in remark.message
    # The released pass works on that graph, so that strict mode has nothing to raise.
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "cache"))
    if dynamic:  # it needs nothing of this process
        assert subprocess.run([sys.executable, str(path)]).returncode == 0
    path.write_text(path.read_text().replace("layers=[0]", "layers=[7]"))
    with pytest.raises(BackendCompilerFailed, match="names 7; the model has 2"):
        repeat(path)


def repeat(path):
    with torch._dynamo.config.patch(capture_scalar_outputs=False):  # which it sets
        runpy.run_path(str(path), run_name="__main__")


def _fails(self, model, context):
    raise RuntimeError("half-way")


COVERING = [
    "pattern=vertical-slash,window=4096",
    "pattern=tri-shape,window=4096,sink=0",
    "pattern=streaming,sink=64,window=64,heads=[{pattern=a-shape,window=4096}]",
]


@pytest.mark.parametrize("options", COVERING)
def test_visit_lists_that_cover_everything_are_dense(options):
    mask = padding_mask([150, 90], 150, "right")
    gm = capture(TINY["llama"](), input_ids=token_ids(2, 150), attention_mask=mask)[0]
    with torch.no_grad():
        expected = gm(*gm.meta["arguments"])
        config = load_config(f"sparse-attention{{{options},force=true}}")
        record = run_passes(gm, config.pipeline, PipelineOptions(strict=True))[0]
        gm.recompile()
        actual = gm(*gm.meta["arguments"])
    assert record.changed
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def test_tri_shape_leaves_the_last_rows_dense():
    config = load_config(
        "sparse-attention{pattern=tri-shape,sink=2,window=8,last=4,layers=[0],"
        "force=true}"
    )
    gm = capture(TINY["llama"](), input_ids=token_ids(1, 200))[0]
    found = []
    for passes in ([], config.pipeline):
        run_passes(gm, passes, PipelineOptions(strict=True))
        values = Recorder(gm)
        with torch.no_grad():
            values.run(*gm.meta["arguments"])
        node = ModelGraph(gm).attention[0].node
        found.append(values.seen[node])
    dense, sparse = found
    torch.testing.assert_close(sparse[:, :, -4:], dense[:, :, -4:])
    assert (sparse[:, :, 100] - dense[:, :, 100]).abs().max() > 1e-3


class Recorder(torch.fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, gm):
        super().__init__(gm)
        self.seen = {}

    def run_node(self, n):
        self.seen[n] = super().run_node(n)
        return self.seen[n]
