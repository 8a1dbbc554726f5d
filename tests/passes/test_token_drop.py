"""`token-drop` against transformers' eager layers on each row's own tokens."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
import transformers as tf

import graphopt
from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.graph_diff import reports_of
from graphopt.ops.tokens import spread_scores
from graphopt.passes.tokens.schedule import DropPoint, steps
from graphopt.search.runner import configured
from tests.models import TINY, padding_mask, token_ids
from tests.rewriting import rewritten, traced

LAYERS = 5  # the least in which each of the three points has its own
ONE = "schedule=[{layer=0,keep=0.7}]"
TWO = "schedule=[{layer=0,keep=0.7},{layer=2,percentile=30}]"
THREE = "schedule=[{layer=0,keep=0.7},{layer=2,percentile=30},{depth=0.9,keep=0.3}]"
POINTS = [
    DropPoint(layer=0, keep=0.7),
    DropPoint(layer=2, percentile=30.0),
    DropPoint(depth=0.9, keep=0.3),
]


def model_of(kind="llama", layers=LAYERS):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "initializer_range": 0.3,  # attention that tells tokens apart
    }
    torch.manual_seed(3)
    made = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**sizes, head_dim=16)),
    }[kind]()
    return made.eval().double()


def eager(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def scores_by_hand(method, model, layer, hidden, places, rotary, first):
    """The scores of one row's tokens; ``first`` are those of the first drop."""
    if method == "random":
        # By place among the tokens that reach the first drop, padding included.
        return first if first is not None else spread(places)
    if method == "fastv" and first is not None:
        return first
    states = layer.input_layernorm(hidden)
    n = hidden.shape[1]
    mask = torch.full((n, n), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
    weights = layer.self_attn(states, position_embeddings=rotary, attention_mask=mask)
    return weights[1][0, :, -1].mean(0)


def spread(places):
    return spread_scores(torch.empty(1, max(places) + 1, 1), 0)[0, places]


def even_places(n, count):
    return [i for i in range(n) if (i + 1) * count // n > i * count // n]


def runs_by_hand(n, count):
    """The first token, its followers in even runs, the last token; places of each."""
    if count >= n:
        return [[i] for i in range(n)]
    inner, runs, found = n - 2, count - 2, [[]]
    for i in range(1, inner + 1):
        found[-1].append(i)
        if i * runs // inner > (i - 1) * runs // inner:
            found.append([])
    return [[0], *found[:-1], [n - 1]]


@torch.no_grad()
def row_by_hand(model, ids, places, tokens, method, plan):
    """Logits of a row's last token: its real tokens lie at ``places`` of ``tokens``."""
    base, hidden = model.model, model.model.embed_tokens(ids[None, places])
    count, first, alive = tokens, None, torch.tensor(places)
    for index, layer in enumerate(base.layers):
        rotary = base.rotary_emb(hidden, alive[None])
        n = len(alive)
        mask = torch.full((n, n), float("-inf"), dtype=hidden.dtype).triu(1)
        before = hidden
        hidden = layer(
            hidden, attention_mask=mask[None, None], position_embeddings=rotary
        )
        if index not in plan:
            continue
        count = -(-(plan[index].keep.numerator * count) // plan[index].keep.denominator)
        kept_count = min(n, count)
        if method == "pool":
            runs = runs_by_hand(n, count)
            hidden = torch.stack([hidden[:, run].mean(1) for run in runs], 1)
            alive = alive[[run[-1] for run in runs]]
            continue
        if method == "uniform":
            kept = even_places(n, count) if count < n else list(range(n))
        else:
            score = scores_by_hand(
                method, model, layer, before, alive.tolist(), rotary, first
            )
            order = sorted(range(n), key=lambda i: (i != n - 1, -float(score[i]), i))
            kept = sorted(order[:kept_count])
            if method in ("fastv", "random"):
                first = score[kept]
        hidden, alive = hidden[:, kept], alive[kept]
    return model.lm_head(base.norm(hidden[:, -1]))[0]


def by_hand(model, ids, mask, method, points):
    rows = []
    for row in range(ids.shape[0]):
        places = mask[row].nonzero()[:, 0].tolist()
        plan = {step.layer: step for step in steps(points, len(model.model.layers))}
        rows.append(row_by_hand(model, ids[row], places, ids.shape[1], method, plan))
    return torch.stack(rows)


def check_rows(fast, model, method, points):
    """Three prompt lengths, with padding of its own for each row."""
    twin = eager(model)
    for tokens, shortest in ((40, 31), (23, 5), (64, 64)):
        ids, mask = token_ids(2, tokens), padding_mask([tokens, shortest], tokens)
        with torch.no_grad():
            out = fast(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        expected = by_hand(twin, ids, mask, method, points)
        # Rotary angles are float32, also in a float64 model.
        torch.testing.assert_close(out.logits[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_compiled_once_for_every_length():
    model, before = model_of(layers=2), len(graphopt.last_reports())
    options = {"config": f"structured-mask,token-drop{{method=lazy,{ONE}}}"}
    fast = torch.compile(model, backend="graphopt", dynamic=True, options=options)
    check_rows(fast, model, "lazy", POINTS[:1])
    assert len(graphopt.last_reports()) == before + 1


@pytest.mark.parametrize(
    ("method", "kind", "drops"),
    [("fastv", "llama", 3), ("lazy", "qwen3", 3)]
    + [(m, "llama", 2) for m in ("random", "uniform", "pool")],
)
def test_equals_the_layers_on_the_kept_tokens(method, kind, drops):
    """Of the rewritten graph itself: it runs without Inductor."""
    model, captures = model_of(kind, drops + 2), []
    schedule = {2: TWO, 3: THREE}[drops]
    edit = configured(f"structured-mask,token-drop{{method={method},{schedule}}}")

    def backend(gm, inputs):
        captures.append(gm)
        edit(gm)
        return gm

    fast = torch.compile(model, backend=backend, dynamic=True)
    check_rows(fast, model, method, POINTS[:drops])
    assert len(captures) == 1


def test_several_last_tokens_and_their_neighbours():
    """observe and smooth, by hand: rows of different lengths, one shorter than 9."""
    model, captures = model_of(layers=3), []
    options = "observe=9,smooth=3,schedule=[{layer=0,keep=0.5}]"
    edit = configured(f"structured-mask,token-drop{{{options}}}")
    ids, mask = token_ids(3, 24), padding_mask([24, 17, 6], 24)

    def backend(gm, inputs):
        captures.append(edit(gm))
        return gm

    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, dynamic=True)
    given = {"use_cache": False, "logits_to_keep": 1}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = fast(ids, attention_mask=mask, position_ids=positions, **given).logits
        for one, seen, found in zip(ids, mask.bool(), out[:, 0], strict=True):
            wanted = observed_by_hand(eager(model), one[seen], 9, 12)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def observed_by_hand(model, ids, observe, count, smooth=3):
    base, places = model.model, torch.arange(len(ids))
    hidden = base.embed_tokens(ids[None])
    for index, layer in enumerate(base.layers):
        rotary = base.rotary_emb(hidden, places[None])
        n = hidden.shape[1]
        mask = torch.full((n, n), float("-inf"), dtype=hidden.dtype).triu(1)
        inside = layer.input_layernorm(hidden)
        attended, weights = layer.self_attn(
            inside, position_embeddings=rotary, attention_mask=mask[None, None]
        )
        hidden = hidden + attended
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if index == 0:
            score = weights[0, :, -observe:].mean((0, 1))
            half = smooth // 2
            near = [score[max(0, i - half) : i + half + 1].max() for i in range(n)]
            near[-1] = torch.tensor(float("inf"))
            best = torch.stack(near).argsort(descending=True, stable=True)[:count]
            kept = best.sort().values
            hidden, places = hidden[:, kept], places[kept]
    return model.lm_head(base.norm(hidden[:, -1]))[0]


def test_without_padding_and_with_one_fixed_length():
    model, ids, reports = model_of(layers=3), token_ids(1, 33), []
    config = "token-drop{schedule=[{layer=1,keep=0.4}]}"
    fast = rewritten(model, config, host=traced, dynamic=False, reports=reports)
    with torch.no_grad():
        out = fast(ids, use_cache=False, logits_to_keep=1).logits
        dense = model(ids, use_cache=False, logits_to_keep=1).logits
    assert [r.kind for r in reports[-1].records[0].remarks] == ["applied"]
    assert not torch.allclose(out, dense)


def codes(config, model=None, **inputs):
    given = {"input_ids": token_ids(1, 20), "use_cache": False, "logits_to_keep": 1}
    reports = reports_of(model or TINY["llama"](), config, given | inputs)
    return {
        (r.kind, r.code)
        for report in reports
        for p in report.records
        for r in p.remarks
        if p.name == "token-drop"
    }


HALF = "token-drop{schedule=[{layer=0,keep=0.5}]}"


def test_a_ratio_of_one_leaves_the_graph():
    config = "token-drop{schedule=[{layer=0,keep=1.0}]}"
    assert codes(config) == {("missed", "keeps-all")}


def test_refusals():
    assert codes(HALF) == {("applied", "rewritten")}
    assert codes(HALF, use_cache=True) == {("missed", "cache")}
    assert codes(HALF, logits_to_keep=0) == {("missed", "outputs")}
    last = "token-drop{schedule=[{layer=1,keep=0.5}]}"
    assert codes(last) == {("failure", "schedule")}
    assert codes(HALF, TINY["gemma3"]()) == {("applied", "rewritten")}
    window = "structured-mask,token-drop{schedule=[{layer=0,keep=0.5}]}"
    assert codes(window, TINY["mistral"]()) == {("missed", "model-window")}


def test_encoders_are_left_alone():
    ids = {"input_ids": token_ids(1, 16)}
    reports = reports_of(TINY["bert"](), HALF, ids)
    assert [r.code for r in reports[0].records[0].remarks] == ["not-prefill"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_graph_diff(graph_diff, name):
    inputs = {
        "input_ids": token_ids(2, 20),
        "attention_mask": padding_mask([20, 15], 20),
    }
    config = f"structured-mask,{HALF}"
    graph_diff(
        TINY[name](),
        config,
        f"token-drop-{name}",
        layer=1,
        use_cache=False,
        logits_to_keep=1,
        **inputs,
    )


def test_graph_diff_of_pooling(graph_diff):
    config = "token-drop{method=pool,schedule=[{layer=0,keep=0.5}]}"
    inputs = {
        "input_ids": token_ids(2, 20),
        "attention_mask": padding_mask([20, 15], 20),
    }
    options = {"layer": 0, "use_cache": False, "logits_to_keep": 1}
    graph_diff(
        TINY["llama"](),
        f"structured-mask,{config}",
        "token-drop-pool",
        **options,
        **inputs,
    )


def test_schedules():
    plan = steps(POINTS, 30)
    assert [s.layer for s in plan] == [0, 2, 26]
    assert [s.alive for s in plan] == [
        Fraction(7, 10),
        Fraction(49, 100),
        Fraction(3, 10),
    ]
    depths = [DropPoint(depth=d, keep=0.5 - d / 10) for d in (0.3, 0.6, 0.9)]
    assert [s.layer for s in steps(depths, 30)] == [8, 17, 26]
    with pytest.raises(ValueError, match="behind layer 29 no layer is left"):
        steps([DropPoint(layer=29, keep=0.5)], 30)
    with pytest.raises(ValueError, match="two points of the schedule are behind"):
        steps([DropPoint(layer=2, keep=0.5), DropPoint(layer=2, keep=0.4)], 30)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("{layer=1}", "either 'keep' or 'percentile'"),
        ("{keep=0.5}", "either 'layer' or 'depth'"),
        ("{layer=1,depth=0.5,keep=0.5}", "either 'layer' or 'depth'"),
        ("{layer=1,keep=0.0}", "greater than 0"),
        ("{layer=1,keep=0.3},{layer=2,keep=0.5}", "only 0.3 reach it"),
    ],
)
def test_schedules_that_no_model_has(points, message):
    with pytest.raises(ConfigError, match=message):
        load_config(f"token-drop{{schedule=[{points}]}}")
