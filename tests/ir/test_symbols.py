"""Sizes of static graphs over the token count, against real traces at other counts."""

from __future__ import annotations

import pytest
import sympy
import torch

from graphopt.ir.match import shape_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sizes.slots import TOKENS, leaves
from tests.ir.traces import PAST, trace
from tests.models import TINY, capture, prefilled, token_ids

COUNTS = (20, 16, 64)
NAMES = (
    *("llama", "qwen3", "gpt2", "opt", "gpt_neox"),
    *("falcon", "gemma3", "phi3", "mixtral", "bert"),
)
# The tiny models have 16 channels a head and 64 in all: counts of tokens too. Only
# phi3, which slices its 16 rotary channels out of 16, leaves a literal open at 16.
OPEN = {("phi3", 16)}


def evaluated(value, tokens):
    return int(value.subs(TOKENS, tokens)) if isinstance(value, sympy.Expr) else value


def mistakes(view, other):
    """What the sizes of ``view`` say wrongly of ``other``, a trace at another count."""
    symbols, tokens = view.symbols, other.tokens
    unsure = {(a.node, a.leaf) for a in symbols.ambiguous}
    wrong = []
    for node, real in zip(view.gm.graph.nodes, other.gm.graph.nodes, strict=True):
        assert node.name == real.name
        if node in symbols.shapes:
            found = tuple(evaluated(s, tokens) for s in symbols.shapes[node])
            wrong += [(node.name, found)] if found != tuple(shape_of(real)) else []
        for leaf, number in enumerate(leaves(real)):
            if type(number) is int and node.op != "output":
                expr = symbols.literals.get((node, leaf), leaves(node)[leaf])
                sure = (node, leaf) not in unsure
                if sure and evaluated(expr, tokens) != number:
                    wrong.append((node.name, leaf, expr, number))
    return wrong


def tensors(view):
    return [n for n in view.gm.graph.nodes if shape_of(n) is not None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", COUNTS)
def test_every_size_is_found(name, tokens):
    view = trace(name, tokens)
    for count in COUNTS:
        assert mistakes(view, trace(name, count)) == []
    if (name, tokens) in OPEN:
        assert view.token_symbol is None
        assert {str(a) for a in view.symbols.ambiguous} == {
            f"16 in {side}_pass{layer} (getitem) is 16 or T"
            for side in ("q", "k")
            for layer in ("", "_1")
        }
        return
    assert view.symbols.reason is None
    assert view.token_symbol == TOKENS
    assert set(view.symbols.shapes) == set(tensors(view))


@pytest.mark.parametrize("kind", ["padded", "past"])
def test_masks_and_a_past(kind):
    view, other = trace("llama", 20, kind), trace("llama", 33, kind)
    assert view.symbols.reason is None
    assert mistakes(view, other) == []
    kv_len = view.symbols.shapes[view.attention[0].key][2]
    assert kv_len == (TOKENS + PAST if kind == "past" else TOKENS)


def test_two_readings_are_reported():
    view = trace("llama", 8)
    other = trace("llama", 20)
    assert view.token_symbol is None
    assert mistakes(view, other) == []
    halves = [n for n in view.gm.graph.nodes if n.name == "x1"]
    assert [a.readings for a in view.symbols.ambiguous if a.node in halves] == [
        (8, TOKENS)
    ]
    ((site, code, reason),) = [r for r in view.missed() if r[0] == "graph"]
    assert (site, code) == ("graph", "ambiguous-tokens")
    assert reason.startswith("8 in x1 (getitem) is 8 or T: sizes alone do not tell")


def test_a_value_is_not_taken_for_a_size():
    """A window of as many tokens as there are: shapes are known, the window is not."""
    view = trace("mistral", 8)
    windows = [a for a in view.symbols.ambiguous if str(a).startswith("8 in tensor")]
    assert windows
    assert mistakes(view, trace("mistral", 20)) == []


def test_a_size_that_only_fits_one_count():
    view = trace("gemma3", 4)  # its cache keeps all of 4 tokens, but 7 of more
    assert view.token_symbol is None
    assert "unsolved at" in view.symbols.reason


def test_decode_has_no_symbol():
    model = TINY["llama"]()
    inputs = {"input_ids": token_ids(1, 1)}
    cache_ = prefilled(model, token_ids(1, 20))
    (gm,) = capture(model, dynamic=False, **inputs, past_key_values=cache_)
    view = ModelGraph(gm)
    assert view.token_symbol is None
    assert "one token" in view.symbols.reason
    assert view.missed() == []


def test_vision_tokens_are_no_axis_of_an_input():
    (gm,) = capture(
        TINY["vit"](), dynamic=False, pixel_values=torch.randn(1, 3, 32, 32)
    )
    assert ModelGraph(gm).symbols.reason == "no input has an axis of 17 tokens"


def test_arguments_are_expressions():
    view = trace("llama", 20)
    view_of_query = next(n for n in view.gm.graph.nodes if n.target == "view")
    (_, sizes), _ = view.symbols.arguments(view_of_query)
    assert sizes == (2, TOKENS, -1, 16)


def test_a_dynamic_graph_has_its_own_symbol():
    view = trace("llama", 20, dynamic=True)
    assert view.symbols.symbol == view.token_symbol != TOKENS
    batch, heads, tokens, width = view.symbols.shapes[view.attention[0].query]
    assert (heads, tokens, width) == (4, view.token_symbol, 16)
    assert batch.is_Symbol
