"""After a gather of tokens the rest of the graph follows, and computes the same."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.match import op_name, shape_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.tokens.substitute import substitute_tokens
from graphopt.verify import check_structure, signature
from tests.ir.traces import PAST, Gathers, inputs_of, sizes_with_values, trace
from tests.models import TINY, capture, token_ids


def visible(padding, queries, keys):
    """The causal mask [B, 1, Q, K] at these positions, under a padding mask."""
    causal = keys[None, :] <= queries[:, None]
    return (causal & padding[:, None, keys].bool())[:, None]


@torch.no_grad()
def by_hand(model, input_ids, attention_mask=None, past_key_values=None, step=2):
    """Logits of the kept tokens, layer 0 on all tokens and layer 1 on each second."""
    base, tokens = model.model, input_ids.shape[1]
    past = past_key_values.get_seq_length() if past_key_values else 0
    total = past + tokens
    padding = torch.ones(2, total) if attention_mask is None else attention_mask
    queries, keys = torch.arange(past, total), torch.arange(total)
    kept = torch.arange(0, tokens, step)
    hidden = base.embed_tokens(input_ids)
    for index, layer in enumerate(base.layers):
        if index == 1:
            hidden = hidden[:, kept]
            keys = torch.cat([keys[:past], queries[kept]])
            queries = queries[kept]
        rotary = base.rotary_emb(hidden, queries[None])
        hidden = layer(
            hidden,
            attention_mask=visible(padding, queries, keys),
            position_ids=queries[None],
            past_key_values=past_key_values,
            position_embeddings=rotary,
        )
    return model.lm_head(base.norm(hidden))


def dropped(view, **options):
    gathers = Gathers(view, **options)
    known = set(view.gm.graph.nodes)
    later = substitute_tokens(view, gathers.new)
    check_structure(view.gm, signature(view.gm), known - set(later))
    view.gm.recompile()
    return later


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["padded", "past"])
def test_llama_on_fewer_tokens(kind, dynamic):
    view = trace("llama", 20, kind, dynamic)
    dropped(view, step=2)
    *_, logits = view.gm(*view.gm.meta["arguments"])
    model = TINY["llama"]().double()
    expected = by_hand(model, **inputs_of(model, 20, kind))
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_earlier_layers_keep_their_keys(dynamic):
    view = trace("llama", 20, "past", dynamic)
    dropped(view, step=2)
    outputs = view.gm(*view.gm.meta["arguments"])
    assert sorted(o.shape[2] for o in outputs if o.dim() == 4) == (
        [PAST + 10] * 2 + [PAST + 20] * 2
    )
    sites = ModelGraph(view.gm).attention
    lengths = [int(str(_compat.size_hint(site.kv_len))) for site in sites]
    assert lengths == [PAST + 20, PAST + 10]


def test_one_compilation_serves_every_length():
    """Through AOTAutograd, as a backend of torch.compile, with symbols for sizes."""
    model = TINY["llama"]().double()
    compilations = []

    def backend(gm, inputs):
        fold_float_attributes(gm)
        dropped(ModelGraph(gm), step=3)
        compiled = aot_eager(gm, inputs)
        # Only now: Dynamo starts over once when it meets floats that it must fix.
        compilations.append(gm)
        return compiled

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for tokens in (20, 47):
        with torch.no_grad():
            output = compiled(input_ids=token_ids(2, tokens), use_cache=False)
        expected = by_hand(model, token_ids(2, tokens), step=3)
        # Rotary angles are float32, also in a float64 model.
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-6)
    assert len(compilations) == 1


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3", "phi3"])
def test_a_static_graph_of_other_models(name):
    view = trace(name, 20)
    later = dropped(view, step=3)
    *_, logits = view.gm(*view.gm.meta["arguments"])
    assert logits.shape == (2, 7, 100)
    sizes = [leaf for node in later for leaf in node.args if type(leaf) is int]
    assert 20 not in sizes


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_dynamic_graph_of_other_models(name):
    view = trace(name, 20, dynamic=True)
    dropped(view)
    *_, logits = view.gm(*view.gm.meta["arguments"])
    assert logits.shape == (2, 10, 100)


def test_vision_tokens_need_no_symbol():
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    view = ModelGraph(capture(TINY["vit"](), dynamic=False, **inputs)[0])
    dropped(view)
    states, _ = view.gm(*view.gm.meta["arguments"])
    assert states.shape == (1, 9, 64)


def assert_refused(view, gathered, message):
    before = sizes_with_values(view.gm)
    with pytest.raises(PassError, match=message):
        substitute_tokens(view, gathered)
    assert sizes_with_values(view.gm) == before


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_of_all_tokens_is_refused(dynamic):
    view = trace("llama", 20, "padded", dynamic)
    new = Gathers(view).new
    mask = next(node for node in new if value_of(node).dtype == torch.bool)
    del new[mask]
    assert_refused(view, new, "attn_output_5 cannot follow to .*tokens: ")


def test_a_gather_must_keep_the_other_axes():
    view = trace("llama", 20, "padded")
    gathers = Gathers(view)
    stream = gathers.stream
    with view.gm.graph.inserting_after(gathers.new[stream]):
        narrow = gathers.call(torch.narrow, gathers.new[stream], 2, 0, 32)
    gathers.new[stream] = narrow
    assert_refused(view, gathers.new, "has 32 where .* has 64")


def test_gathering_nothing_is_refused():
    view = trace("llama", 20, "padded")
    assert_refused(view, {}, "no gathered tensor has fewer tokens")


class Block(torch.nn.Module):
    """Two attentions of 2 heads of 8, then ``between`` on [1, T, 16] and T."""

    def __init__(self, between):
        super().__init__()
        self.embed = torch.nn.Embedding(100, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.between = between

    def attend(self, hidden):
        states = self.norm(hidden)
        heads = states.view(1, hidden.shape[1], 2, 8).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return hidden + out.transpose(1, 2).reshape(1, hidden.shape[1], 16)

    def forward(self, input_ids):
        hidden = self.attend(self.embed(input_ids))
        return self.between(self.attend(hidden), input_ids.shape[1])


def block(between, dynamic):
    torch.manual_seed(0)
    ids = token_ids(1, 20)
    (gm,) = capture(Block(between), dynamic=dynamic, input_ids=ids)
    fold_float_attributes(gm)
    return ModelGraph(gm)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "between",
    [
        lambda hidden, tokens: hidden.sum(1) / tokens,
        lambda hidden, tokens: hidden.clamp(max=tokens),
    ],
)
def test_the_token_count_as_a_value_is_refused(between, dynamic):
    view = block(between, dynamic)
    new = Gathers(view).new
    assert_refused(view, new, "sizes do not tell whether .* means the 20 tokens")


@pytest.mark.parametrize("dynamic", [False, True])
def test_new_positions_are_refused(dynamic):
    """Positions made after the gather count all tokens: they are no longer right."""
    view = block(lambda h, tokens: h * torch.arange(tokens)[:, None], dynamic)
    assert_refused(view, Gathers(view).new, "mul.* cannot follow")


@pytest.mark.parametrize("dynamic", [False, True])
def test_new_zeros_follow(dynamic):
    view = block(lambda h, tokens: h + torch.zeros(tokens, 1), dynamic)
    later = dropped(view)
    zeros = next(n for n in later if op_name(n) == "zeros")
    assert _compat.size_hint((shape_of(zeros) or ())[0]) == 10
    (out,) = view.gm(*view.gm.meta["arguments"])
    assert out.shape == (1, 10, 16)
