"""`logit-arithmetic` on the graphs of ensembles and of sums written by hand."""

from __future__ import annotations

import torch

import graphopt
from graphopt.ensembles import with_low_rank
from tests.ensembles.members import LENGTHS, SAMPLING, llama, trio
from tests.models import token_ids
from tests.rewriting import rewritten

CONFIG = "logit-arithmetic"
ALL = "structured-mask,logit-arithmetic,skinny-linear"
QUERY = "model.layers.0.self_attn.q_proj"


def adapted(small, seed=0, **more):
    torch.manual_seed(seed)
    pair = (torch.randn(4, 32), torch.randn(32, 4), 0.5)
    return with_low_rank(small, {QUERY: pair, **more})


def with_adapters(count=1):
    small = llama(32, layers=1, seed=2)
    tuned = [adapted(small, seed) for seed in range(count)]
    return graphopt.ensemble(llama(64, layers=1), tuned, small)


def step(made, sampling=(None, None, None)):
    """The inputs of a decoding step behind a prompt."""
    cache = made.new_cache()
    with torch.no_grad():
        made(token_ids(1, 6), past_key_values=cache, logits_to_keep=1)
    return {"input_ids": token_ids(1, 1), "past_key_values": cache} | (
        {} if sampling is None else {"sampling": sampling}
    )


def remarks(reports):
    every = [r for report in reports for r in report.all_remarks()]
    assert not [r for r in every if r.kind == "failure"]
    return [(r.kind, r.code) for r in every if r.pass_name == CONFIG]


def test_a_sampled_step(graph_diff):
    made = trio(layers=1, top_p=0.8)
    inputs = step(made, (torch.rand(1), torch.tensor(0.7), None))
    text = graph_diff(made, CONFIG, "logit-arithmetic-sampled", **inputs)
    assert "graphopt.combine_sample" in text and "[separate-weights]" in text


def test_an_adapter_over_shared_weights(graph_diff):
    made = with_adapters()
    text = graph_diff(made, CONFIG, "logit-arithmetic-adapter", **step(made))
    assert "8 linears read their weight once" in text


class ByHand(torch.nn.Module):
    """Proxy-tuning as it is written by hand, heads on every position."""

    def __init__(self, members, alpha):
        super().__init__()
        self.members = torch.nn.ModuleList(members)
        self.alpha = alpha

    def forward(self, input_ids):
        base, expert, antiexpert = (
            member(input_ids, use_cache=False).logits[:, -1] for member in self.members
        )
        size = base.shape[-1]
        logits = base + self.alpha * (expert[:, :size] - antiexpert)
        return logits.argmax(-1)


def by_hand(alpha=0.7, dtype=torch.float32):
    made = trio(layers=1)
    return ByHand(made.members, alpha).to(dtype)


def test_a_sum_written_by_hand(graph_diff):
    inputs = {"input_ids": token_ids(2, 6)}
    text = graph_diff(by_hand(), CONFIG, "logit-arithmetic-by-hand", **inputs)
    assert "3 head(s)" in text and "graphopt.combine_sample" in text


@torch.no_grad()
def test_sums_by_hand_give_the_same_token():
    plain, ids, reports = by_hand(torch.tensor(1.3)), token_ids(3, 6), []
    fast = rewritten(plain, CONFIG, reports=reports)
    assert torch.equal(fast(ids), plain(ids))
    assert remarks(reports)[:3] == [("applied", "rewritten")] * 3


@torch.no_grad()
def test_narrow_sums_are_left_alone():
    plain, ids, reports = by_hand(dtype=torch.bfloat16), token_ids(1, 6), []
    assert torch.equal(rewritten(plain, CONFIG, reports=reports)(ids), plain(ids))
    assert ("missed", "dtype") in remarks(reports)


def test_adapters_generate_the_same():
    made, reports = with_adapters(2), []
    ids, more = token_ids(1, 6), {"top_p": 0.9, **SAMPLING, **LENGTHS}
    fast = rewritten(made, ALL, reports=reports)
    found = []
    for model in (made, fast):
        torch.manual_seed(1)
        found.append(model.generate(ids, **more))
    assert torch.equal(*found) and not fast.remarks
    assert remarks(reports[:1])[-1] == ("missed", "many-rows")
    assert remarks(reports[1:])[-1] == ("applied", "rewritten")


@torch.no_grad()
def test_logits_that_are_returned_are_written():
    made, ids, reports = with_adapters(), token_ids(1, 6), []
    fast = rewritten(made, CONFIG + "{force=true}", reports=reports)
    torch.testing.assert_close(fast(ids).logits, made(ids).logits, atol=1e-4, rtol=0)
    assert remarks(reports) == [("missed", "logits-used"), ("applied", "rewritten")]


@torch.no_grad()
def test_what_is_no_twin_is_said():
    base, small = llama(64, layers=1), llama(32, layers=1)
    made, reports = graphopt.ensemble(base, llama(32, layers=2), small), []
    rewritten(made, CONFIG, reports=reports)(**step(made))
    assert remarks(reports)[-1] == ("missed", "not-twins")


@torch.no_grad()
def test_other_models_have_no_combination():
    model, reports = llama(32, layers=1), []
    rewritten(model, CONFIG, reports=reports)(token_ids(1, 4))
    assert remarks(reports) == [("missed", "no-sites")]
