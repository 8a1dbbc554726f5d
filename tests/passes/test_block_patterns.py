"""`sparse-attention` with block-sparse and antidiagonal heads, config to output."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import fx

from graphopt import cost
from graphopt.cli.kernels import emit_kernels, kernel_spec
from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.ir.attention.fused import visit_tables
from graphopt.ir.match import op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.ops.block_list import BlockList
from graphopt.ops.visit_list import VisitList
from graphopt.passes.attention.head_tables import read_table
from graphopt.passes.attention.heads import UNBOUNDED, HeadPattern, HeadRule
from graphopt.passes.attention.plans import layer_plan
from graphopt.pipeline import PipelineOptions, run_passes
from tests.models import TINY, capture, copy_graph, padding_mask, token_ids
from tests.oracle import assert_close, oracle
from tests.rewriting import rewritten as twin
from tests.rewriting import traced

EVERY = (
    "sparse-attention{pattern=antidiagonal,threshold=0.6,sink=2,window=8,force=true,"
    "heads=[{heads=[0],pattern=block-sparse,blocks=2},"
    "{heads=[1],pattern=vertical-slash,vertical=3,slash=2},"
    "{heads=[2],stride=4,threshold=0.5},"
    "{layers=[1],heads=[3],pattern=tri-shape,last=5}]}"
)


def rewritten(text, gm):
    record = run_passes(gm, load_config(text).pipeline, PipelineOptions(strict=True))[0]
    gm.recompile()
    return record


@functools.cache
def captured(padding):
    ids, inputs = token_ids(2, 300), {}
    if padding != "none":
        inputs["attention_mask"] = padding_mask([300, 170], 300, padding)
    return capture(TINY["llama"](), input_ids=ids, **inputs)[0]


def llama(padding="none"):
    return copy_graph(captured(padding))


class Recorder(fx.Interpreter):
    """Keeps the arguments and the result of every attention over visit lists."""

    calls: list[tuple[tuple, torch.Tensor]]

    def run_node(self, n):
        result = super().run_node(n)
        if op_name(n) == "graphopt.visit_attention":
            self.calls.append((self.fetch_args_kwargs_from_env(n)[0], result))
        return result


def calls_of(gm):
    recorder = Recorder(gm)
    recorder.calls = []
    with torch.no_grad():
        recorder.run(*gm.meta["arguments"])
    return recorder.calls


@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_all_patterns_in_one_layer_and_one_launch(kind):
    gm = llama(kind)
    record = rewritten(EVERY, gm)
    assert [r.kind for r in record.remarks] == ["applied"] * 2
    assert "2 kinds" not in record.remarks[0].message
    calls = calls_of(gm)
    assert len(calls) == 2
    for (q, k, v, shown, *rest), result in calls:
        assert rest[11] in ([0, -1, 1, 2], [0, -1, 1, -1])
        lists, blocks = VisitList(*rest[:4]), BlockList(*rest[9:])
        seen = lists.visited(rest[4], 300, 300, 0, blocks)
        assert 0.05 < seen.double().mean() < 0.48  # dense is 0.5
        if shown is not None:
            seen = seen & shown[:, None, None]
        assert_close(result, oracle(q, k, v, seen, rest[6]), torch.float32)


COVERING = [
    "pattern=antidiagonal,threshold=1.0",
    "pattern=antidiagonal,threshold=1.0,heads=[{heads=[2],pattern=block-sparse}]",
    "pattern=block-sparse,blocks=5",
    "pattern=block-sparse,blocks=9,heads=[{heads=[0],pattern=dense}]",
]


@pytest.mark.parametrize("options", COVERING)
def test_the_exact_settings_are_dense_bit_for_bit(options):
    gm = llama()
    with torch.no_grad():
        expected = gm(*gm.meta["arguments"])
        record = rewritten(f"sparse-attention{{{options},force=true}}", gm)
        actual = gm(*gm.meta["arguments"])
    assert record.changed
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    ["pattern=antidiagonal,threshold=0.999999", "pattern=block-sparse,blocks=4"],
)
def test_nearly_everything_is_nearly_dense(options):
    """One block fewer than there are: the sparse kernels run and say the same."""
    gm = llama()
    with torch.no_grad():
        expected = gm(*gm.meta["arguments"])
        rewritten(f"sparse-attention{{{options},force=true}}", gm)
        actual = gm(*gm.meta["arguments"])
    assert calls_of(gm)
    row = slice(0, 256)  # at most four blocks, all of them visited
    torch.testing.assert_close(
        actual[0][:, row], expected[0][:, row], atol=2e-5, rtol=2e-4
    )


def test_rows_say_what_a_head_selects():
    base = HeadPattern("antidiagonal", stride=8, threshold=0.8)
    rule = HeadRule(pattern="block-sparse", blocks=7)
    row = base.overridden(rule).row()
    assert (row.blocks, row.stride, row.window) == (7, 0, 0)
    row = base.row()
    assert (row.blocks, row.stride, row.threshold) == (0, 8, 0.8)
    assert HeadPattern("antidiagonal", threshold=1.0).row().exact_to() == UNBOUNDED
    plan = layer_plan([HeadPattern("block-sparse", blocks=7), HeadPattern("dense")])
    assert plan.narrowest() == 7 * 64
    assert plan.describe() == (
        f"visit lists, sink 0, window {UNBOUNDED}, best 7 blocks (2 kinds of heads)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stride=5", "stride"),
        ("threshold=0.0", "threshold"),
        ("threshold=1.5", "threshold"),
        ("blocks=0", "blocks"),
        ("heads=[{heads=[0],stride=3}]", "stride"),
    ],
)
def test_wrong_options(text, message):
    with pytest.raises((ConfigError, ValidationError), match=message):
        load_config(f"sparse-attention{{pattern=antidiagonal,{text}}}")


def test_tables_name_the_patterns(tmp_path):
    heads = {"0": ["block_sparse", 80, 0, 0.9], "1": ["stream_llm", 4, 8, 0.5]}
    path = tmp_path / "table.json"
    path.write_text(json.dumps([heads]))
    found = read_table(str(path), 0.5).layers[0]
    assert found[0] == HeadPattern("block-sparse", blocks=80)
    path = tmp_path / "table.toml"
    path.write_text(
        '[[heads]]\nheads = [1]\npattern = "antidiagonal"\nstride = 4\n'
        "threshold = 0.75\n"
    )
    own = read_table(str(path), 0.5).pattern(0, 1, 1, HeadPattern("dense"))
    assert (own.pattern, own.stride, own.threshold) == ("antidiagonal", 4, 0.75)


def test_sites_say_what_was_selected():
    gm = llama()
    rewritten(EVERY, gm)
    tables = visit_tables(ModelGraph(gm).attention[0])
    assert tables[0][4:6] == (2, 0)
    assert tables[1] == (2, 8, 3, 2, 0, 0, 1.0)
    assert [t[4:] for t in tables[2:]] == [(0, 4, 0.5), (0, 16, 0.6)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_emitted_kernels_are_named(device):
    gm = llama()
    rewritten(EVERY, gm)
    specs = [kernel_spec(site) for site in ModelGraph(gm).attention]
    assert {spec.block for spec in specs} == {64}
    texts = {p.name: p.read_text() for p in emit_kernels(specs, device)}
    wanted = "graphopt_select_blocks" if device == "cpu" else "block_heads_ptr"
    assert any(wanted in text for text in texts.values())


def test_predicted_pairs():
    shape = cost.AttentionShape(1, 1, 64, 4)
    tables = {"dense": (0, 2**31 - 1), "sparse": (0, 0, 0, 0, 100)}

    def flops(sizes, tokens):
        return cost.attention_cost(shape, "visit-list", *sizes).at(1, tokens)[0]

    # A hundred blocks of 64 keys, and one product of means per pair of blocks.
    assert flops(tables["sparse"], 65536) / flops(tables["dense"], 65536) == (
        pytest.approx(2 * 6368 / 65536, rel=0.06)
    )
    for tokens, density in ((2048, 1.0), (8192, 0.44), (131072, 0.073)):
        share = flops((0, 0, 0, 0, 0, 16), tokens) / flops(tables["dense"], tokens)
        assert share == pytest.approx(density + 1 / 32, rel=0.01)
    exact = cost.visit_pays_from(0, 0, 0, 0, "cpu", 0, 16, 1.0)
    assert exact > UNBOUNDED
    assert cost.visit_pays_from(0, 0, 0, 0, "cpu", 0, 16, 0.9) == 4096


def test_lengths_share_one_graph():
    """Prefill over a cache is the operators' affair; here lengths come and go."""
    model, reports = TINY["llama"](), []
    text = EVERY.replace("threshold=0.6", "threshold=1.0")
    fast = twin(model, text, host=traced, reports=reports)
    with torch.no_grad():
        wanted = {n: model(token_ids(1, n), use_cache=False).logits for n in (40, 300)}
        for length in (300, 40, 129):
            found = fast(token_ids(1, length), use_cache=False).logits
            assert found.shape[1] == length and not found.isnan().any()
            if length == 40:
                torch.testing.assert_close(found, wanted[40], atol=1e-4, rtol=1e-3)
    assert len(reports) == 1


def test_prefill_over_a_cache_that_is_not_empty():
    """170 queries over 130 earlier keys: the offset is no multiple of a block."""
    model, ids = TINY["llama"](), token_ids(2, 300)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids[:, :130], past_key_values=cache)
    gm = capture(model, input_ids=ids[:, 130:], past_key_values=cache)[0]
    rewritten(EVERY, gm)
    calls = calls_of(gm)
    assert len(calls) == 2
    for (q, k, v, shown, *rest), result in calls:
        assert (shown, rest[5]) == (None, 130)
        lists, blocks = VisitList(*rest[:4]), BlockList(*rest[9:])
        seen = lists.visited(rest[4], 170, 300, 130, blocks)
        assert seen.any(-1).all() and not seen.tril(130).logical_xor(seen).any()
        assert_close(result, oracle(q, k, v, seen, rest[6]), torch.float32)
