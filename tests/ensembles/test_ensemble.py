"""An ensemble's logits and what `generate` makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import graphopt
from graphopt.ensembles import EnsembleCache
from graphopt.errors import ConfigError, GraphoptError
from graphopt.ops.logits import nucleus
from tests.ensembles.members import LENGTHS, SAMPLING, by_hand, llama, trio
from tests.models import padding_mask, token_ids

MASK = padding_mask([9, 5], 9)


@torch.no_grad()
def test_logits_are_the_sum():
    ids, made = token_ids(2, 9), trio(beta=0.7)
    found = made(ids, attention_mask=MASK, logits_to_keep=2)
    expected = by_hand(made, ids, MASK)[:, -2:]
    assert found.logits.shape == (2, 2, 100) and found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits.double(), expected, atol=1e-4, rtol=0)
    assert isinstance(found.past_key_values, EnsembleCache)


@torch.no_grad()
def test_pairs_with_weights_in_any_order():
    base, first, second = llama(64), llama(32, seed=1), llama(32, seed=2)
    small, ids = llama(32, seed=3), token_ids(2, 9)
    one = graphopt.ensemble(base, [first, second], small, 0.9, weights=[0.3, 0.7])
    other = graphopt.ensemble(base, [second, first], small, 0.9, weights=[0.7, 0.3])
    assert len(one.members) == 4  # the shared reference runs once
    logits = one(ids).logits
    expected = by_hand(one, ids)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(logits, other(ids).logits)
    even = graphopt.ensemble(base, [first, second], [small, small])
    assert even.weights.tolist() == [0.5, 0.5]


@torch.no_grad()
def test_identities():
    base, tuned, small = llama(64), llama(32, seed=1), llama(32, seed=2)
    ids = token_ids(2, 9)
    still = graphopt.ensemble(base, tuned, small, beta=0.0)
    assert torch.equal(still(ids).logits, base(ids).logits)
    same = graphopt.ensemble(base, tuned, tuned)
    assert torch.equal(same(ids).logits, base(ids).logits)
    own = graphopt.ensemble(small, tuned, small)
    assert len(own.members) == 2
    torch.testing.assert_close(own(ids).logits, tuned(ids).logits, atol=1e-5, rtol=0)


def test_generate_is_the_base_and_the_tuned_model():
    base, tuned, small = llama(64), llama(32, seed=1), llama(32, seed=2)
    ids, more = token_ids(2, 9), {"attention_mask": MASK, **LENGTHS}
    still = graphopt.ensemble(base, tuned, small, beta=0.0)
    expected = base.generate(ids, **more)
    assert torch.equal(still.generate(ids, **more), expected) and not still.remarks
    own = graphopt.ensemble(small, tuned, small)
    assert torch.equal(own.generate(ids, **more), tuned.generate(ids, **more))
    for beams in (2, 3):
        found = still.generate(ids, num_beams=beams, **more)
        assert torch.equal(found, base.generate(ids, num_beams=beams, **more))


def greedy(made, ids, steps, mask=None, own=None):
    """Tokens from whole forwards, without caches; ``own`` is the tuned prompt."""
    start = ids.shape[1]
    for _ in range(steps):
        given = {}
        if own is not None:
            new = torch.cat([own[0], ids[:, start:]], 1)
            ones = own[1].new_ones(len(ids), new.shape[1] - own[1].shape[1])
            given["m1"] = {
                "input_ids": new,
                "attention_mask": torch.cat([own[1], ones], 1),
            }
        seen = None
        if mask is not None:
            ones = mask.new_ones(len(ids), ids.shape[1] - start)
            seen = torch.cat([mask, ones], 1)
        logits = by_hand(made, ids, seen, **given)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, start:]


@torch.no_grad()
def test_caches_padding_and_prompts_of_their_own():
    ids, made = token_ids(2, 9), trio()
    chat, seen = token_ids(2, 14, seed=4), padding_mask([14, 11], 14)
    more = {"attention_mask": MASK, "max_new_tokens": 6, "pad_token_id": 0}
    more["eos_token_id"] = None
    found = made.generate(ids, **more)[:, 9:]
    assert torch.equal(found, greedy(made, ids, 6, MASK))
    own = {"tuned_input_ids": chat, "tuned_attention_mask": seen}
    other = made.generate(ids, **own, **more)[:, 9:]
    assert torch.equal(other, greedy(made, ids, 6, MASK, (chat, seen)))
    assert not torch.equal(found, other)
    without = made.generate(ids, use_cache=False, **own, **more)[:, 9:]
    assert torch.equal(other, without)
    several = made.generate(ids, **own, **more, num_beams=2, num_return_sequences=2)
    assert several.shape == (4, 15)


def test_a_cache_goes_on_where_it_ended():
    ids, made, more = token_ids(1, 9), trio(), {**LENGTHS, "eos_token_id": None}
    whole = made.generate(ids, **more)
    cache = made.new_cache()
    half = made.generate(ids, past_key_values=cache, **{**more, "max_new_tokens": 3})
    assert cache.get_seq_length() == 11 and len(cache) == 2
    rest = made.generate(half, past_key_values=cache, **{**more, "max_new_tokens": 5})
    assert torch.equal(rest, whole)
    cache.crop(-4)
    assert [m.get_seq_length() for m in cache.members] == [12, 12, 12]
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.members[2].layers[0].keys.shape[0] == 2
    paged = EnsembleCache([graphopt.Cache() for _ in made.members])
    assert torch.equal(made.generate(ids, past_key_values=paged, **more), whole)


def test_sampling_repeats_and_ends():
    ids, made = token_ids(3, 5), trio()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(made.generate(ids, temperature=0.8, **SAMPLING, **LENGTHS))
        assert not made.remarks
    assert torch.equal(*found)
    end = int(found[0][0, 7])
    torch.manual_seed(3)
    ended = made.generate(
        ids, temperature=0.8, **SAMPLING, **{**LENGTHS, "eos_token_id": end}
    )
    assert ended[0, 7] == end and not ended[0, 8:].any()


def test_what_is_not_fused_is_said():
    ids, made = token_ids(1, 5), trio()
    made.generate(ids, repetition_penalty=1.3, **LENGTHS)
    assert "RepetitionPenalty" in made.remarks[0].message
    made.generate(ids, do_sample=True, **LENGTHS)
    assert "TopK" in made.remarks[0].message
    scores = {"output_scores": True, "return_dict_in_generate": True}
    plain = made.generate(ids, **scores, **LENGTHS)
    assert "scores" in made.remarks[0].message
    assert torch.equal(plain.sequences, made.generate(ids, **LENGTHS))


@torch.no_grad()
def test_the_filter_of_the_base():
    ids, made = token_ids(2, 9), trio(top_p=0.4)
    base = made.base(ids).logits
    kept = nucleus(base, 0.4)
    found = made(ids).logits
    assert torch.equal(found.isfinite(), kept)
    expected = by_hand(made, ids).masked_fill(~kept, -torch.inf)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    fused = made.generate(ids, **LENGTHS)
    assert not made.remarks
    scores = {"output_scores": True, "return_dict_in_generate": True}
    assert torch.equal(made.generate(ids, **scores, **LENGTHS).sequences, fused)
    made.generate(ids, top_p=0.9, **SAMPLING, **LENGTHS)
    assert "filter" in made.remarks[0].message


def test_the_filter_behind_is_that_of_generate():
    made = trio(top_p=0.3, top_p_of="combined")
    assert made.top_p is None and made.generation_config.top_p == 0.3
    made.generate(token_ids(1, 5), **SAMPLING, **LENGTHS)
    assert not made.remarks


def test_logits_without_a_token_are_an_error():
    made = trio()
    with torch.no_grad():
        made.base.lm_head.weight[5] = torch.nan
    with pytest.raises(GraphoptError, match="no token to choose"):
        made.generate(token_ids(1, 5), **LENGTHS)


def test_beta_and_weights_compile_nothing_anew():
    made, counts = trio(layers=1), []
    ids, graphs = token_ids(1, 1), []

    def backend(gm, _):
        graphs.append(gm)
        return gm

    made.compile(backend=backend, dynamic=True, fullgraph=True)
    for beta in (1.0, 0.5, 2.0):
        made.beta.fill_(beta)
        made.weights.fill_(beta + 1)
        cache = made.new_cache()
        with torch.no_grad():
            made(token_ids(1, 6), past_key_values=cache, logits_to_keep=1)
            for _ in range(2):
                made(ids, past_key_values=cache, sampling=(None, None, None))
        counts.append(len(graphs))
    assert counts[0] == counts[-1]


def test_mistakes_have_messages():
    base, small = llama(64), llama(32)
    cases = [
        (lambda: graphopt.ensemble(base, [small] * 3, [small] * 2), "one reference"),
        (lambda: graphopt.ensemble(base, small, small, weights=[1, 2]), "2 weights"),
        (lambda: graphopt.ensemble(base, small, small, top_p=1.5), "top_p = 1.5"),
        (lambda: graphopt.ensemble(base, small, small, top_p_of="x"), "allowed"),
        (lambda: graphopt.ensemble(base, torch.nn.Linear(2, 2), small), "no language"),
        (lambda: trio()(token_ids(1, 2), past_key_values=DynamicCache()), "new_cache"),
        (lambda: trio().new_cache().update(None, None, 0), "cache.members"),
        (lambda: trio()(token_ids(1, 2), members=(None,) * 3), "logits_to_keep"),
        (lambda: trio().generate(tuned_input_ids=token_ids(1, 2)), "input_ids too"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(ConfigError, match="one model's"):
        trio().generate(token_ids(1, 2), cache_implementation="static")


def test_one_model_with_two_prompts():
    base, small = llama(64), llama(32)
    ids, chat = token_ids(1, 5), token_ids(1, 9, seed=2)
    shared = graphopt.ensemble(base, small, small)
    with pytest.raises(ConfigError, match=r"copy\.copy"):
        shared.generate(ids, tuned_input_ids=chat, reference_input_ids=ids)
    made = graphopt.ensemble(base, copy.copy(small), small)
    found = made.generate(ids, tuned_input_ids=chat, **LENGTHS)
    assert not torch.equal(found, base.generate(ids, **LENGTHS))
