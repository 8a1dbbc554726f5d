"""`schedule`: chunks out of order give, bit for bit, what they give in order."""

from __future__ import annotations

import operator
import random

import pytest
import torch
from torch import fx

from graphopt import _compat
from graphopt.backend import last_reports, rewrite
from graphopt.config import load_config
from graphopt.errors import ConfigError, PassError
from graphopt.ir.loops import find_loop, innermost, loop_of, order_of
from graphopt.ir.op_groups import op_groups
from graphopt.options import parse_options
from graphopt.outline import compile_loop
from graphopt.runtime.schedule.dag import chunk_dag
from graphopt.runtime.schedule.policies import POLICIES
from graphopt.runtime.schedule.program import chunk_runs
from graphopt.runtime.schedule.simulator import simulate
from graphopt.runtime.schedule.workers import Workers
from tests.models import TINY, WINDOW, capture, padding_mask, token_ids
from tests.rewriting import rewritten, traced

CHUNK = 8
CHUNKED = f"chunked-prefill{{chunk={CHUNK}}}"
CONFIG = f"{CHUNKED},schedule"
# 1 chunk, full and short of a token; 2 and 3; 2, 3 and 5 with a last that overlaps.
LENGTHS = [37, CHUNK, CHUNK - 1, 2 * CHUNK, 3 * CHUNK, CHUNK + 1, 2 * CHUNK + 3]


@pytest.fixture(autouse=True)
def _four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def as_is(piece, inputs):
    return piece


class Compiled:
    """A model through the backend, with ``compile_one`` in Inductor's place.

    Without ``schedule`` in its config the graph runs as it is.
    """

    def __init__(self, name, config=CONFIG, compile_one=as_is):
        self._begin(config, compile_one)
        self.model = rewritten(TINY[name](), config, host=self._host)

    def _begin(self, config, compile_one=as_is):
        self.loop, self.remarks, self.compile_one = None, [], compile_one
        self.as_it_is = "schedule" not in config

    def _host(self, gm, inputs):
        assert self.loop is None, "prompts of all lengths run through one graph"
        self.loop = loop_of(find_loop(gm))
        if self.as_it_is:
            return gm
        return compile_loop(gm, self.compile_one, True, self.remarks.append).run

    def __call__(self, ids, **inputs):
        found = self.model(ids, use_cache=True, **inputs)
        layers = found.past_key_values.layers
        return [found.logits, *(x for n in layers for x in (n.keys, n.values))]

    def force(self, policy, workers=3, overlap=True):
        """Run the chunks of every prompt by ``policy``, unmeasured."""
        program, machine = self.loop.scheduler.program, Workers(workers)

        def run(call):
            runs, chunks = chunk_runs(program, call), len(call.pasts)
            draw, waits = random.Random(chunks), overlap and call.overlaps
            dag = chunk_dag(program.groups, chunks, lambda *_: draw.random(), waits)
            plan = simulate(dag, machine.processors, policy)
            machine.out_of_order(runs, dag, plan)

        run.program = program
        self.loop.scheduler = run


class Captured(Compiled):
    """A tiny Llama on one prompt, whose body ``edit`` changes once it is chunked."""

    def __init__(self, config, edit=lambda body: None, **inputs):
        self._begin(config)
        gm = capture(TINY["llama"](), **inputs)[0]
        rewrite(gm, parse_options({"config": config}))
        edit(innermost(gm))
        self.arguments = gm.meta["arguments"]
        self.run = self._host(gm, self.arguments)

    def __call__(self):
        return [x for x in self.run(*self.arguments) if isinstance(x, torch.Tensor)]


def shuffled(seed):
    """Return a policy that runs ready tasks at random."""
    draw = random.Random(seed)

    def pick(processor, ready, state):
        return draw.choice(ready) if ready else None

    return lambda dag, processors: pick


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "compile_one"), [("llama", traced), ("gemma3", as_is)]
)
@torch.no_grad()
def test_out_of_order_is_in_order_bit_for_bit(name, compile_one):
    loop, fast = Compiled(name, CHUNKED), Compiled(name, compile_one=compile_one)
    longer = [n for n in LENGTHS if n > WINDOW or name == "llama"]
    prompts = [token_ids(2, length, seed=length) for length in longer]
    want = [loop(ids) for ids in prompts]
    for _ in range(7):  # warm, measured twice, tried, measured, tried, decided
        assert_equal(fast(prompts[0]), want[0])
    assert_told(fast.remarks)
    for policy in (*POLICIES.values(), *map(shuffled, range(3))):
        fast.force(policy)
        for ids, expected in zip(prompts, want, strict=True):
            assert_equal(fast(ids), expected)


def assert_told(remarks):
    (remark,) = remarks
    assert (remark.kind, remark.code, remark.site) == ("analysis", "order", "chunks")
    assert remark.figures["chunks"] == 5
    assert remark.figures["tasks"] == 5 * 6
    assert remark.figures["policy"] in ("greedy", "in-order")
    assert remark.message.endswith("is kept")


def differ_by_chunk(body):
    """Let the keys and values of one token depend on the chunk that computes them."""
    past = next(n for n in body.graph.nodes if n.name == "past")
    for write in [n for n in body.graph.nodes if "append_rows" in str(n.target)]:
        with body.graph.inserting_before(write):
            new = body.graph.call_function(operator.mul, (write.args[0], past))
        new.meta = dict(write.args[0].meta)
        write.update_arg(0, new)
    body.recompile()


@torch.no_grad()
def test_a_last_chunk_waits_for_readers_of_the_keys_that_it_writes_again():
    ids = token_ids(2, 2 * CHUNK + 3)
    want = Captured(CHUNKED, differ_by_chunk, input_ids=ids)()
    fast = Captured(CONFIG, differ_by_chunk, input_ids=ids)
    assert_equal(fast(), want)

    def last_chunk_first(dag, processors):
        return lambda processor, ready, state: max(ready, default=None)

    fast.force(last_chunk_first, workers=1)
    assert_equal(fast(), want)
    fast.force(last_chunk_first, workers=1, overlap=False)
    assert not all(map(torch.equal, fast(), want))


SPARSE = "sparse-attention{sink=4,window=6,force=true}"
INT8 = "shadow-outlier{activations=dynamic,weights=memory}"


@pytest.mark.parametrize(
    ("other", "config"),
    [
        (SPARSE, f"{CHUNKED},schedule,{SPARSE}"),
        (INT8, f"{CHUNKED},{INT8},schedule"),
    ],
    ids=["behind", "in-front"],
)
@torch.no_grad()
def test_other_passes_rewrite_the_body_that_is_cut(other, config):
    mask = padding_mask([27, 12], 27)
    inputs = {"input_ids": token_ids(2, 27), "attention_mask": mask}
    want = Captured(f"{CHUNKED},{other}", **inputs)()
    fast = Captured(config, **inputs)
    assert_equal(fast(), want)
    fast.force(shuffled(1))
    assert_equal(fast(), want)


@torch.no_grad()
def test_by_the_backend(monkeypatch):
    """Inductor compiles one kind, which takes long enough, and runs it in threads."""
    whole, compiled = _compat.compile_fx, []

    def compile_fx(gm, inputs, patches):
        compiled.append(torch._inductor.config.cpp.dynamic_threads)
        return whole(gm, inputs, patches) if len(compiled) == 1 else traced(gm, inputs)

    monkeypatch.setattr(_compat, "compile_fx", compile_fx)
    model, ids = TINY["llama"](), token_ids(1, 3 * CHUNK - 2)
    options = {"config": f"{CHUNKED},schedule{{force=true}}"}
    fast = torch.compile(model, backend="graphopt", options=options, dynamic=True)
    want = model(ids).logits
    for _ in range(8):
        torch.testing.assert_close(fast(ids).logits, want, atol=2e-5, rtol=1e-4)
    assert compiled == [True, True, True, False, False]  # the groups, and around them
    report = last_reports()[-1]
    codes = {r.code for r in report.all_remarks() if r.site == "chunks"}
    assert codes == {"rewritten", "order"}
    layers = next(r for r in report.remarks if r.site == "layers")
    assert layers.figures == {"layers": 2, "kinds": 3}
    assert '"order"' in (report.directory / "report.json").read_text()


def captured(name, config=CONFIG, tokens=27):
    gm = capture(TINY[name](), input_ids=token_ids(2, tokens))[0]
    report, _ = rewrite(gm, parse_options({"config": config}))
    return gm, report.records[-1].remarks[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_groups_of_a_layer(name):
    gm, remark = captured(name)
    found = op_groups(innermost(gm))
    assert [group.name for group in found] == ["qkv", "attention", "ffn"] * 2
    assert [group.layer for group in found] == [0, 0, 0, 1, 1, 1]
    assert [len(group.writes) for group in found] == [2, 0, 0, 2, 0, 0]
    body = [
        n for n in innermost(gm).graph.nodes if n.op not in ("placeholder", "output")
    ]
    assert sorted(body) == sorted(n for g in found for n in (*g.nodes, *g.writes))
    assert remark.kind == "applied"
    assert "6 tasks a chunk in 2 layers, greedy on 2 processors" in remark.message


def test_options():
    gm, _ = captured("llama", f"{CHUNKED},schedule{{policy=stagger,processors=4}}")
    order = order_of(innermost(gm))
    assert (order.policy, order.processors) == ("stagger", 4)
    for text in ("schedule{policy=gready}", "schedule{processors=0}"):
        with pytest.raises(ConfigError, match=r"policy|at least 1"):
            load_config(text)
    with pytest.raises(ConfigError, match="put it behind"):
        load_config("schedule,chunked-prefill")


def test_needs_a_loop():
    _, remark = captured("llama", "schedule")
    assert (remark.kind, remark.code) == ("missed", "no-loop")
    assert "chunked-prefill" in remark.message


def test_a_body_that_cannot_be_cut():
    gm, _ = captured("llama", CHUNKED)
    body = innermost(gm)
    op = torch.ops.graphopt.attention.default
    attention = body.graph.find_nodes(op="call_function", target=op)
    attention[1].update_arg(1, attention[0].args[1])
    with pytest.raises(PassError, match="reads keys or values of another layer"):
        op_groups(body)
    with pytest.raises(PassError, match="no layer writes keys"):
        op_groups(fx.GraphModule({}, fx.Graph()))
