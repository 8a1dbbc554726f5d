"""`token-drop` with `graphopt.Cache`: decoding over what each layer kept."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import graphopt
from graphopt.errors import ConfigError
from graphopt.passes.tokens.schedule import DropPoint, steps
from tests.models import padding_mask, token_ids
from tests.passes.test_token_drop import eager, model_of
from tests.rewriting import by_pieces, rewritten

LAYERS = 4
POINTS = [DropPoint(layer=0, keep=0.7), DropPoint(layer=2, keep=0.4)]
CONFIG = "structured-mask,token-drop{schedule=[{layer=0,keep=0.7},{layer=2,keep=0.4}]}"
FINAL = CONFIG.replace("{schedule", "{cache=final,schedule")


class Row:
    """One row of a batch in transformers' eager layers, on its real tokens alone."""

    def __init__(self, model, ids, tokens):
        self.model, self.ids, self.tokens = model, ids, tokens
        self.cache = DynamicCache()
        self.alive = {}  # the places that each layer's cache holds

    def prefill(self):
        base, n = self.model.model, len(self.ids)
        alive, count = torch.arange(n), self.tokens
        hidden = base.embed_tokens(self.ids[None])
        plan = {step.layer: step for step in steps(POINTS, LAYERS)}
        for index, layer in enumerate(base.layers):
            hidden, weights = self._layer(index, layer, hidden, alive)
            self.alive[index] = alive
            if index in plan:
                keep = plan[index].keep
                count = -(-keep.numerator * count // keep.denominator)
                score = weights[0, :, -1].mean(0)
                score[-1] = float("inf")
                kept = score.argsort(descending=True, stable=True)[:count].sort().values
                hidden, alive = hidden[:, kept], alive[kept]
        return self.model.lm_head(base.norm(hidden[:, -1]))[0]

    def _layer(self, index, layer, hidden, places):
        rotary = self.model.model.rotary_emb(hidden, places[None])
        n = hidden.shape[1]
        mask = torch.full((n, n), float("-inf"), dtype=hidden.dtype).triu(1)
        inside = layer.input_layernorm(hidden)
        attended, weights = layer.self_attn(
            inside,
            position_embeddings=rotary,
            attention_mask=mask[None, None] if n > 1 else None,
            past_key_values=self.cache,
        )
        hidden = hidden + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights

    def compact(self):
        """Keep in every layer what lives behind the last drop."""
        final = self.alive[LAYERS - 1]
        for index, layer in enumerate(self.cache.layers):
            kept = torch.isin(self.alive[index], final)
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]

    def decode(self, token, place):
        base = self.model.model
        hidden = base.embed_tokens(token[None, None])
        for index, layer in enumerate(base.layers):
            hidden, _ = self._layer(index, layer, hidden, torch.tensor([place]))
        return self.model.lm_head(base.norm(hidden[:, -1]))[0]


def by_hand(model, ids, mask, steps, final):
    """Greedy tokens and their logits, [B, steps] and [B, steps, V]."""
    tokens, logits = [], []
    for one, seen in zip(ids, mask.bool(), strict=True):
        row = Row(model, one[seen], ids.shape[1])
        found = [row.prefill()]
        if final:
            row.compact()
        for step in range(steps - 1):
            found.append(row.decode(found[-1].argmax(), int(seen.sum()) + step))
        logits.append(torch.stack(found))
        tokens.append(logits[-1].argmax(-1))
    return torch.stack(tokens), torch.stack(logits)


def generated(model, config, ids, mask, steps=5):
    cache = graphopt.Cache.from_config(config, max_tokens=128)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1), cache


@pytest.mark.parametrize("config", [CONFIG, FINAL], ids=["layer", "final"])
def test_decoding_sees_what_each_layer_kept(config):
    model = model_of(layers=LAYERS)
    fast = rewritten(model, config)
    for tokens, padded in ((40, 9), (23, 0)):
        ids, mask = (
            token_ids(2, tokens),
            padding_mask([tokens, tokens - padded], tokens),
        )
        found, logits, cache = generated(fast, config, ids, mask)
        with torch.no_grad():
            wanted, expected = by_hand(eager(model), ids, mask, 5, config == FINAL)
        assert torch.equal(found, wanted)
        # Rotary angles are float32, also in a float64 model.
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
        held = [layer.lengths.tolist() for layer in cache.layers]
        first = tokens - padded if padded else tokens
        if config == CONFIG:
            assert held[0] == [tokens + 4] * 2  # with its padding: nothing is dropped
        assert held[3] == [-(-2 * tokens // 5) + 4] * 2 or first < tokens
        assert len({tuple(row) for row in held}) == (1 if config == FINAL else 3)


def test_compiled_by_pieces():
    model, config = model_of(layers=3), CONFIG.replace(",{layer=2,keep=0.4}", "")
    ids, mask = token_ids(2, 30), padding_mask([30, 26], 30)
    fast = rewritten(model, config, host=by_pieces)
    found, _, cache = generated(fast, config, ids, mask, steps=3)
    expected, _, _ = generated(rewritten(model, config), config, ids, mask, steps=3)
    assert torch.equal(found, expected)
    assert cache.has_dropped()


@pytest.fixture(scope="module")
def dropped():
    model = model_of(layers=LAYERS)
    fast = rewritten(model, CONFIG)
    ids = token_ids(2, 24)
    with torch.no_grad():
        cache = graphopt.Cache.from_config(CONFIG, max_tokens=128)
        fast(ids, past_key_values=cache, logits_to_keep=1)
    return model, cache


def test_a_model_without_the_pass_says_what_is_missing(dropped):
    model, cache = dropped
    with torch.no_grad(), pytest.raises(RuntimeError, match="36 of 50 tokens are left"):
        model(token_ids(2, 1), past_key_values=copy.deepcopy(cache))


def test_cropping_says_why_not(dropped):
    with pytest.raises(ConfigError, match="tokens were dropped from it"):
        dropped[1].crop(-1)


def test_saved_rows_are_the_same(dropped, tmp_path):
    cache = dropped[1]
    cache.save(tmp_path / "it")
    again = graphopt.Cache.load(tmp_path / "it")
    for one, other in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(one.lengths, other.lengths)
    assert again.has_dropped()


def test_selected_rows_take_their_counts_along(dropped):
    cache = copy.deepcopy(dropped[1])
    cache.layers[3].lengths[1] -= 3
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    assert cache.layers[3].lengths.tolist() == [7, 10, 7]
    cache.reset()
    assert not cache.has_dropped()
    assert cache.layers[3].lengths.tolist() == [0, 0, 0]


def test_without_a_drop_the_tokens_are_those_of_a_dense_model():
    model, config = model_of(layers=LAYERS), "token-drop{schedule=[{layer=0,keep=1.0}]}"
    ids, mask = token_ids(2, 20), padding_mask([20, 13], 20)
    cache = DynamicCache()
    want = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    found, _, kept = generated(rewritten(model, config), config, ids, mask, steps=4)
    assert torch.equal(found, want[:, 20:])
    assert not kept.has_dropped()
