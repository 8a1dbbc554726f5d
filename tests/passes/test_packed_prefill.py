"""`packed-prefill`: real tokens get what the padded run gives them."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.backend import rewrite
from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.options import parse_options
from tests.models import TINY, capture, padding_mask, token_ids
from tests.rewriting import rewritten

FLAT, BINS = "packed-prefill", "packed-prefill{mode=bins}"
CASES = [
    ("llama", "left", FLAT),
    ("llama", "right", BINS),
    ("mistral", "right", FLAT),
    ("gemma2", "left", BINS),
    ("gpt2", "left", FLAT),
    ("bert", "right", FLAT),
]
LENGTHS = [1, 24, 9, 17]
TOKENS = 24


def batch(side="left", lengths=LENGTHS, tokens=TOKENS):
    mask = padding_mask(lengths, tokens, side)
    return {"input_ids": token_ids(len(lengths), tokens), "attention_mask": mask}


def remark(model, config, **inputs):
    """The one remark of the pass on the first graph of ``model``."""
    gm = capture(model, **inputs)[0]
    report, _ = rewrite(gm, parse_options({"config": config}))
    return report.records[0].remarks[0]


def real_tokens(x, mask):
    """The real tokens of an output [B, S, ...], or [B, H, S, D] of a cache."""
    x = x.transpose(1, 2) if x.dim() == 4 else x
    return x[mask[:, -x.shape[1] :].bool()]  # a sliding window keeps no more


@pytest.mark.parametrize(("name", "side", "config"), CASES)
@torch.no_grad()
def test_equals_the_padded_run(name, side, config):
    inputs = batch(side)
    gm = capture(TINY[name](), **inputs)[0]
    padded = gm(*gm.meta["arguments"])
    report, _ = rewrite(gm, parse_options({"config": config}))
    assert report.records[0].remarks[0].kind == "applied"
    for got, want in zip(gm(*gm.meta["arguments"]), padded, strict=True):
        if not isinstance(want, torch.Tensor) or want.dim() < 3:  # not of all tokens
            continue
        got, want = (real_tokens(x, inputs["attention_mask"]) for x in (got, want))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "paged"), [("gemma3", True)])
@torch.no_grad()
def test_generates_the_same_tokens(name, paged):
    model, inputs = TINY[name](), batch()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**inputs, **options)
    cache = {"past_key_values": graphopt.Cache()} if paged else {}
    got = rewritten(model, FLAT).generate(**inputs, **options, **cache)
    assert torch.equal(got, want)


@torch.no_grad()
def test_the_head_runs_on_the_tokens_asked_for():
    model, inputs = TINY["llama"](), batch()
    inputs["logits_to_keep"] = 3
    got = rewritten(model, FLAT)(**inputs).logits
    assert got.shape[1] == 3
    shown = inputs["attention_mask"][:, -3:].bool()
    torch.testing.assert_close(got[shown], model(**inputs).logits[shown])


@torch.no_grad()
def test_all_logits_are_computed_packed():
    model, inputs = TINY["llama"](), batch()
    gm = capture(model, **inputs)[0]
    rewrite(gm, parse_options({"config": FLAT}))
    last = [n for n in gm.graph.nodes if n.target is torch._C._nn.linear][-1]
    assert [str(user.target) for user in last.users] == [
        "graphopt.unpack_tokens.default"
    ]


@torch.no_grad()
def test_holes_stay_where_they_are():
    model, inputs = TINY["mistral"](), batch()
    mask = inputs["attention_mask"]
    mask[1, 5:9] = mask[3, -4] = 0
    want, got = model(**inputs).logits, rewritten(model, FLAT)(**inputs).logits
    got, want = (real_tokens(x, mask) for x in (got, want))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_graph_of_fixed_sizes():
    model, inputs = TINY["llama"](), batch()
    gm = capture(model, dynamic=False, **inputs)[0]
    want = gm(*gm.meta["arguments"])
    report, _ = rewrite(
        gm, parse_options({"config": "packed-prefill{mode=bins,bins=3}"})
    )
    assert report.records[0].changed
    real = inputs["attention_mask"].bool()
    got = gm(*gm.meta["arguments"])
    torch.testing.assert_close(got[-1][real], want[-1][real])
    sizes = [
        n.meta["example_value"] for n in gm.graph.nodes if n.name == "hidden_states"
    ]
    assert all(isinstance(size, int) for x in sizes for size in x.shape)


@torch.no_grad()
def test_one_compilation_serves_every_batch():
    model = TINY["llama"]()
    compiled = torch.compile(
        TINY["llama"](), backend="graphopt", options={"config": FLAT}, dynamic=True
    )
    before = len(graphopt.last_reports())
    for lengths in (LENGTHS, [5, 40, 40], [30, 30], [2, 3, 4, 5, 6, 7]):
        inputs = batch(lengths=lengths, tokens=max(lengths))
        want, got = model(**inputs).logits, compiled(**inputs).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-4)
    assert len(graphopt.last_reports()) == before + 1
    with pytest.raises(ValueError, match="row 2 of the attention mask is all padding"):
        compiled(**batch(lengths=[4, 9, 0]))


@pytest.mark.parametrize(
    ("name", "change", "code", "reason"),
    [
        ("llama", {"attention_mask": None}, "no-padding", "no mask tells which"),
        ("llama", {"rows": 1}, "one-prompt", "one row"),
        ("llama", {"past": True}, "past", "keys for"),
        ("gpt_oss", {}, "attention", "sinks"),
        ("mixtral", {}, "cannot-follow", "may look from one token at others"),
    ],
)
@torch.no_grad()
def test_refusals(name, change, code, reason):
    model, inputs = TINY[name](), batch()
    inputs = {k: v[1 : 1 + change.get("rows", 4)] for k, v in inputs.items()}
    if "attention_mask" in change:
        inputs["attention_mask"] = None
    if "past" in change:
        first = model(**inputs, use_cache=True)
        inputs["past_key_values"] = first.past_key_values
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(mask)], 1)
    found = remark(
        model, FLAT, dynamic=name != "llama" or "rows" not in change, **inputs
    )
    assert (found.kind, found.code) == ("missed", code)
    assert reason in found.message


def test_bins_need_their_mode():
    with pytest.raises(ConfigError, match="mode = 'bins'"):
        load_config("packed-prefill{bins=2}")
