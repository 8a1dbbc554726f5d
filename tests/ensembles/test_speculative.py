"""Speculative decoding keeps the ensemble's distribution, row by row."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache

import graphopt
from graphopt.ensembles import speculate
from graphopt.ensembles.rows import crop_rows
from graphopt.errors import ConfigError
from tests.ensembles.members import llama, trio
from tests.models import padding_mask, token_ids

VOCABULARY, STEPS, DRAWS = 6, 3, 8_000


def tiny(**options):
    vocabulary = {"vocab": VOCABULARY, "layers": 1}
    models = [llama(h, seed=s, **vocabulary) for h, s in ((64, 0), (32, 1), (32, 2))]
    return graphopt.ensemble(*models, **options)


@torch.no_grad()
def enumerated(made, prompt, temperature, member=None):
    """The probability of every continuation of STEPS tokens, in order."""
    every = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=STEPS)))
    ids = torch.cat([prompt.expand(len(every), -1), every], 1)
    logits = made(ids).logits if member is None else member(ids).logits
    odds = (logits.double() / temperature).softmax(-1)[:, prompt.shape[1] - 1 : -1]
    return odds.gather(-1, every[..., None])[..., 0].prod(1)


def counted(tokens):
    """How often each continuation was drawn, [VOCABULARY ** STEPS]."""
    places = VOCABULARY ** torch.arange(STEPS - 1, -1, -1)
    return (tokens * places).sum(1).bincount(minlength=VOCABULARY**STEPS).double()


def differs(counts, odds):
    """Pearson's chi-square: whether ``counts`` are no draws of ``odds``.

    Five standard deviations off its mean: once in a million draws by chance.
    """
    possible = odds > 1e-9
    if counts[~possible].any():
        return True
    wanted = counts.sum() * odds[possible]
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    freedom = int(possible.sum()) - 1
    return bool(statistic > freedom + 5 * (2 * freedom) ** 0.5)


@pytest.mark.parametrize(("block", "top_p"), [(1, 0.7), (3, None)])
def test_the_distribution_is_the_ensembles(block, top_p):
    made, prompt = tiny(beta=1.2, top_p=top_p), torch.tensor([[1, 5, 3]])
    expected = enumerated(made, prompt, 0.8)
    found = speculate(
        made,
        prompt.expand(DRAWS, -1),
        max_new_tokens=STEPS,
        block=block,
        temperature=0.8,
        generator=torch.Generator().manual_seed(0),
    )
    counts = counted(found.sequences[:, 3:])
    assert not differs(counts, expected)
    assert 0.1 < found.accepted / found.drafted < 0.95
    # The draft's own distribution, and the base's, would not pass.
    for member in made.members[:2]:
        assert differs(counts, enumerated(made, prompt, 0.8, member))
        assert differs(DRAWS * enumerated(made, prompt, 0.8, member), expected)


@torch.no_grad()
def test_greedy_rows_with_padding_accept_different_numbers():
    made, mask = trio(), padding_mask([9, 4, 7], 9)
    ids = token_ids(3, 9)
    more = {"max_new_tokens": 12, "pad_token_id": 0}
    expected = made.generate(ids, attention_mask=mask, eos_token_id=None, **more)
    found = speculate(made, ids, mask, temperature=0, block=3, **more)
    assert torch.equal(found.sequences, expected)
    end = int(expected[1, 12])
    ended = made.generate(ids, attention_mask=mask, eos_token_id=end, **more)
    stopped = speculate(
        made, ids, mask, temperature=0, block=3, eos_token_id=end, **more
    )
    assert torch.equal(stopped.sequences, ended)


@torch.no_grad()
def test_a_draft_that_is_the_ensemble_is_always_taken():
    small, ids = llama(32), token_ids(2, 5)
    made = graphopt.ensemble(small, small, small)
    found = speculate(made, ids, max_new_tokens=10, block=4)
    assert found.accepted == found.drafted and found.rounds == 2


@torch.no_grad()
def test_prompts_of_their_own():
    made, ids = trio(), token_ids(2, 5)
    own = (token_ids(2, 8, seed=3), padding_mask([8, 6], 8))
    given = {"tuned_input_ids": own[0], "tuned_attention_mask": own[1]}
    expected = made.generate(ids, max_new_tokens=7, eos_token_id=None, **given)
    prompts = (None, own, None)
    found = speculate(made, ids, max_new_tokens=7, temperature=0, prompts=prompts)
    assert torch.equal(found.sequences, expected)


@torch.no_grad()
def test_rows_forget_for_themselves():
    model, ids = llama(32), token_ids(2, 9)
    cache, short = DynamicCache(), DynamicCache()
    model(ids, past_key_values=cache)
    mask = crop_rows(cache, torch.ones_like(ids), torch.tensor([1, 4]))
    assert mask.tolist() == [[1] * 8, [0] * 3 + [1] * 5]
    model(ids[1:, :5], past_key_values=short)
    kept = cache.layers[1].keys[1:, :, 3:]
    torch.testing.assert_close(kept, short.layers[1].keys, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="side by side"):
        crop_rows(cache, torch.ones_like(ids), torch.tensor([1, 1]))


def test_mistakes_have_messages():
    with pytest.raises(ConfigError, match="block = 0"):
        speculate(trio(), token_ids(1, 2), max_new_tokens=3, block=0)
    assert speculate(trio(), token_ids(1, 2), max_new_tokens=1).sequences.shape == (
        1,
        3,
    )
