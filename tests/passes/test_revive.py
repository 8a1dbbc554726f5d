"""`token-drop` with ``revive``: dropped tokens come back in later decoding steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import graphopt
from graphopt.errors import ConfigError
from graphopt.ir.match import op_name
from graphopt.passes.tokens.schedule import DropPoint, steps
from tests.models import padding_mask, token_ids
from tests.passes.test_token_drop import eager, model_of
from tests.rewriting import by_pieces, inductor, rewritten

LAYERS = 4
POINTS = [DropPoint(layer=0, keep=0.7), DropPoint(layer=2, keep=0.4)]
SCHEDULE = "schedule=[{layer=0,keep=0.7},{layer=2,keep=0.4}]"
CONFIG = f"structured-mask,token-drop{{revive=true,{SCHEDULE}}}"


ONCE = CONFIG.replace(",{layer=2,keep=0.4}", "")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """`rewritten` sees to it; what `dropped` traced serves all its tests."""


class Row:
    """LazyLLM in transformers' eager layers: one row's real tokens, lists of places."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens
        self.plan = {step.layer: step for step in steps(POINTS, LAYERS)}
        self.kept = [{} for _ in range(LAYERS)]  # place -> key and value [Hkv, D]
        self.left = {}  # place -> the layer that computed it last, and what it gave
        self.revived = 0

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Be a cache: write the tokens of the step, read those it sees."""
        kept = self.kept[layer_idx]
        for i, place in enumerate(self.now):
            assert place not in kept  # each token is computed at most once in a layer
            kept[place] = key[0, :, i], value[0, :, i]
        found = [kept[place] for place in self.seen]
        return tuple(torch.stack(x, 1)[None] for x in zip(*found, strict=True))

    def run(self, ids):
        """Return the logits [V] behind the last of the new tokens ``ids`` [S]."""
        base, past = self.model.model, len(self.kept[0])
        self.now = list(range(past, past + len(ids)))
        self.seen, count = list(range(past + len(ids))), self.tokens
        hidden = base.embed_tokens(ids[None])
        for index, layer in enumerate(base.layers):
            hidden, weights = self.layer(index, layer, hidden)
            if index in self.plan:
                keep = self.plan[index].keep
                count = -(-keep.numerator * count // keep.denominator)
                hidden = self.choose(index, hidden, weights[0, :, -1].mean(0), count)
        self.tokens += 1
        return self.model.lm_head(base.norm(hidden[:, -1]))[0]

    def choose(self, index, hidden, score, count):
        newest = self.seen[-1]
        score[-1] = math.inf
        best = score.argsort(descending=True, stable=True)[:count].sort().values
        self.seen = [self.seen[i] for i in best.tolist()]
        self.left |= {p: (index, hidden[0, i]) for i, p in enumerate(self.now)}
        prompt = len(self.now) > 1 and newest not in self.kept[LAYERS - 1]
        before = set(self.now)
        self.now = [p for p in self.seen if self.left.get(p, (None,))[0] == index]
        self.revived += 0 if prompt else len(set(self.now) - before)
        states = torch.stack([self.left[p][1] for p in self.now])[None]
        self.left = {p: s for p, s in self.left.items() if p not in self.now}
        return states

    def layer(self, index, layer, hidden):
        now, seen = torch.tensor(self.now), torch.tensor(self.seen)
        rotary = self.model.model.rotary_emb(hidden, now[None])
        mask = torch.where(seen <= now[:, None], 0.0, -math.inf).to(hidden.dtype)
        attended, weights = layer.self_attn(
            layer.input_layernorm(hidden),
            position_embeddings=rotary,
            attention_mask=mask[None, None],
            past_key_values=self,
        )
        hidden = hidden + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights


class Writes(TorchDispatchMode):
    """Notes each write of a token to the keys of a layer: (pool, row, place).

    A call at a time: rows of a batch that wait for others repeat their newest token.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.graphopt.write_tokens.default:
            places, pool = args[2].tolist(), args[4].data_ptr()
            rows = enumerate(places)
            self.calls.append({(pool, b, p) for b, row in rows for p in row})
        if func is torch.ops.graphopt.append_pages.default:
            past, pool = args[2].tolist(), args[4].data_ptr()
            new = range(args[0].shape[2])
            rows = enumerate(past)
            self.calls.append({(pool, b, p + i) for b, p in rows for i in new})
        return func(*args, **(kwargs or {}))


def decoded(model, ids, mask, tokens, config=CONFIG, cache=None):
    """Feed the tokens [B, N] one by one; return logits [B, N + 1, V] and the cache."""
    if cache is None:
        cache = graphopt.Cache.from_config(config, model, max_tokens=128)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, **given)
        found.append(out.logits[:, -1])
        for i in range(tokens.shape[1]):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            at = mask.sum(1, keepdim=True) - 1
            token = tokens[:, i : i + 1]
            out = model(token, attention_mask=mask, position_ids=at, **given)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1), cache


def by_hand(model, ids, mask, tokens):
    """Return logits, revived tokens by row, and all (layer, row, place) computed."""
    logits, revived, computed = [], [], set()
    rows = zip(ids, mask.bool(), tokens, strict=True)
    for number, (one, seen, after) in enumerate(rows):
        row = Row(eager(model), ids.shape[1])
        with torch.no_grad():
            found = [row.run(one[seen])] + [row.run(t[None]) for t in after]
        logits.append(torch.stack(found))
        revived.append(row.revived)
        computed |= {(i, number, p) for i, kept in enumerate(row.kept) for p in kept}
    return torch.stack(logits), revived, computed


def real_writes(writes, mask):
    """Layers by their pools, in their order, and places among a row's real tokens."""
    layer = {pool: i for i, pool in enumerate(dict.fromkeys(w[0] for w in writes))}
    pads = (mask.shape[1] - mask.sum(1)).tolist()
    return {(layer[w], b, p - pads[b]) for w, b, p in writes if p >= pads[b]}


@pytest.mark.parametrize("batch", [1, 2])
def test_equals_the_layers_on_lists_of_places(batch):
    model, writes = model_of(layers=LAYERS), Writes()
    fast = rewritten(model, CONFIG, writes)
    for length, padded in ((40, 9), (23, 0)):
        ids, tokens = token_ids(batch, length), token_ids(batch, 6)
        mask = padding_mask([length - padded * (b == 0) for b in range(batch)], length)
        writes.calls.clear()
        found, _ = decoded(fast, ids, mask, tokens)
        wanted, revived, computed = by_hand(model, ids, mask, tokens)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
        assert min(revived) > 0
        everything = [write for call in writes.calls for write in call]
        assert len(everything) == len(set(everything))  # at most once in a layer
        assert real_writes(everything, mask) == computed


def test_everything_kept_is_dense():
    model, ids, tokens = model_of(layers=LAYERS), token_ids(2, 20), token_ids(2, 3)
    mask, config = (
        padding_mask([20, 13], 20),
        CONFIG.replace("0.7", "1").replace("0.4", "1"),
    )
    found, cache = decoded(rewritten(model, config), ids, mask, tokens, config)
    wanted, _ = decoded(model, ids, mask, tokens, cache=DynamicCache())
    torch.testing.assert_close(found, wanted)
    assert not cache.has_dropped()


@pytest.fixture(scope="module")
def dropped():
    model = model_of(layers=LAYERS)
    fast = rewritten(model, CONFIG)
    ids, mask = token_ids(2, 24), padding_mask([24, 20], 24)
    return model, fast, mask, decoded(fast, ids, mask, token_ids(2, 2))[1]


def after(model, mask, cache):
    """Logits [B, V] of one more token."""
    rows = cache.batch_size
    mask = torch.cat((mask, mask.new_ones(len(mask), 3)), 1)[
        :, : cache.get_seq_length() + 1
    ]
    with torch.no_grad():
        return model(
            token_ids(rows, 1, seed=5)[:1].expand(rows, 1),
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
        ).logits[:, -1]


def test_a_cache_is_the_same_on_disk(dropped, tmp_path):
    _, fast, mask, cache = dropped
    cache.save(tmp_path / "it")
    again = graphopt.Cache.load(tmp_path / "it")
    assert again.has_dropped()
    wanted = after(fast, mask, copy.deepcopy(cache))
    torch.testing.assert_close(after(fast, mask, again), wanted)


def test_rows_take_their_states_along(dropped):
    _, fast, mask, cache = dropped
    wanted = after(fast, mask, copy.deepcopy(cache))
    order, beams = torch.tensor([1, 1]), copy.deepcopy(cache)
    beams.batch_select_indices(order)
    torch.testing.assert_close(after(fast, mask[order], beams), wanted[order])
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(after(fast, mask.flip(0), swapped), wanted.flip(0))


def test_the_last_tokens_can_be_forgotten(dropped):
    _, fast, mask, cache = dropped
    once, twice = copy.deepcopy(cache), copy.deepcopy(cache)
    wanted = after(fast, mask, once)
    after(fast, mask, twice)
    twice.crop(-1)
    # What came back for the token that is forgotten has been computed, and stays so.
    assert after(fast, mask, twice).shape == wanted.shape
    twice.reset()
    assert not twice.has_dropped()


def test_a_model_without_the_pass_says_what_is_missing(dropped):
    model, _, mask, cache = dropped
    with pytest.raises(RuntimeError, match="tokens were dropped behind some layer"):
        after(model, mask, copy.deepcopy(cache))


def test_a_cache_grows_with_its_states(dropped):
    _, fast, mask, cache = dropped
    grown = copy.deepcopy(cache)
    before = grown.hidden.states.clone()
    grown.max_tokens = None
    grown._grow(500)
    assert grown.hidden.depth.shape[1] == grown.rows.capacity >= 500
    assert torch.equal(grown.hidden.states[:, : before.shape[1]], before)
    torch.testing.assert_close(
        after(fast, mask, grown), after(fast, mask, copy.deepcopy(cache))
    )


def test_another_cache_later():
    """Then Dynamo no longer says that the mask is as long as the ids."""
    model, ids, tokens = model_of(layers=2), token_ids(1, 40), token_ids(1, 1)
    fast, mask = rewritten(model, ONCE), padding_mask([40], 40)
    wanted, _ = decoded(fast, ids, mask, tokens, ONCE)
    cache = graphopt.Cache.from_config(ONCE, model)  # of another size
    found, _ = decoded(fast, ids, mask, tokens, cache=cache)
    torch.testing.assert_close(found, wanted)


def test_configs_that_contradict_themselves():
    for options in ("revive=true,method=random", "revive=true,cache=final"):
        with pytest.raises(ConfigError, match="revive = true needs method = 'lazy'"):
            graphopt.Cache.from_config(f"token-drop{{{options}}}")
    with pytest.raises(ConfigError, match="give model="):
        graphopt.Cache.from_config(CONFIG)
    with pytest.raises(ConfigError, match="hidden_size keeps dropped tokens"):
        graphopt.Cache(hidden_size=64, dropping=True)


def decoding_by_inductor(gm, inputs):
    """Steps have sizes that data give; the prompt's drop is compiled elsewhere."""
    decodes = any(op_name(n) == "graphopt.missing_places" for n in gm.graph.nodes)
    return (inductor if decodes else by_pieces)(gm, inputs)


def test_compiled():
    model, config = model_of(layers=2), ONCE
    ids, tokens = token_ids(2, 30), token_ids(2, 3)
    mask = padding_mask([30, 26], 30)
    expected, _ = decoded(rewritten(model, config), ids, mask, tokens, config)
    fast = rewritten(model, config, host=decoding_by_inductor)
    found, _ = decoded(fast, ids, mask, tokens, config)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)  # float32 angles
