"""Both ends of real models: token embedding, final norm and LM head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.backend import rewrite
from graphopt.ir.copying import copy_module
from graphopt.ir.match import op_name, sizes_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.structure import ends_text, structure_rows
from graphopt.options import parse_options
from tests.ir.views import LENGTH, build, later_view, values, view
from tests.models import capture, token_ids

TIED = ("gemma3", "gpt2", "opt", "falcon", "bloom", "cohere", "bart")
UNTIED = ("llama", "phi3", "gpt_neox", "mixtral", "gpt_oss", "granite", "gptj")
HEADS = (*TIED, *UNTIED)
NORMS = {
    **dict.fromkeys(HEADS, "layer"),
    **dict.fromkeys(
        ("gemma3", "llama", "phi3", "mixtral", "gpt_oss", "granite"), "rms"
    ),
}
# Logits are scaled, or get a bias of their own, after the linear.
CHANGED_LOGITS = ("cohere", "granite", "bart")


def returned(model):
    """Return the last output of a decoder: its logits."""
    return model.gm.graph.find_nodes(op="output")[0].args[0][-1]


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    model = view(name)
    head, embedding = model.head, model.embedding
    assert sizes_of(head.weight) == sizes_of(embedding.weight) == (100, 64)
    assert head.tied == (name in TIED)
    assert (head.weight is embedding.weight) == head.tied
    assert sizes_of(head.logits)[-1] == 100
    assert sizes_of(head.input)[-1] == sizes_of(head.hidden)[-1] == 64
    assert head.norm.kind == NORMS[name]
    assert (head.bias is not None) == (name == "gptj")
    assert (head.output is head.logits) == (name not in (*CHANGED_LOGITS, "opt"))


@pytest.mark.parametrize("name", [n for n in HEADS if n != "bart"])
def test_the_output_is_what_the_graph_returns(name):
    model = view(name)
    assert model.head.output is returned(model)


@pytest.mark.parametrize("name", HEADS)
def test_embeddings(name):
    model = view(name)
    embedding = model.embedding
    assert op_name(embedding.node) == "embedding"
    assert embedding.vocabulary == 100
    given = [n for n in model.gm.graph.find_nodes(op="placeholder") if n.users]
    ids = embedding.ids if embedding.ids in given else embedding.ids.args[0]
    assert ids in given
    found = values(model, [embedding.ids, embedding.weight, embedding.node])
    expected = F.embedding(found[embedding.ids], found[embedding.weight])
    assert torch.equal(found[embedding.node], expected)


def test_a_decoder_has_the_embedding_that_its_head_predicts():
    model = view("bart")
    assert values(model, [model.embedding.ids])[model.embedding.ids].shape == (2, 5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_the_final_norm_reads_the_end_of_the_stream(name):
    model = view(name)
    assert model.head.norm.input in (
        model.layers[1].output,
        *(u for u in model.layers[1].output.users if op_name(u) == "to"),
    )


def test_every_token_is_kept_by_default():
    head = view("llama").head
    assert op_name(head.input) == "getitem"
    assert head.input.args[0] is head.hidden
    assert head.hidden is head.norm.output
    assert sizes_of(head.input) == sizes_of(head.hidden)


def test_some_logits_to_keep():
    model = view("llama", logits_to_keep=3)
    head = model.head
    assert head.input.args[0] is head.hidden
    assert sizes_of(head.hidden)[1] == model.token_symbol
    found = values(model, [head.input, head.hidden, head.logits])
    assert torch.equal(found[head.input], found[head.hidden][:, -3:])
    assert found[head.logits].shape == (2, 3, 100)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "cohere", "bart"])
def test_logits_are_the_product_of_input_and_weight(name):
    model = view(name)
    head = model.head
    nodes = [n for n in (head.input, head.weight, head.bias) if n is not None]
    found = values(model, [*nodes, head.logits, head.output])
    assert torch.equal(found[head.logits], F.linear(*(found[n] for n in nodes)))
    scaled = 0.0625 if name == "cohere" else 1.0
    assert torch.equal(found[head.logits] * scaled, found[head.output])


@pytest.mark.parametrize(("rows", "found"), [(96, True), (50, False)])
def test_a_head_has_a_row_for_nearly_every_id(rows, found):
    model = build("llama")
    model.lm_head = nn.Linear(64, rows)
    (gm,) = capture(model, input_ids=token_ids(2, LENGTH))
    assert (ModelGraph(gm).head is not None) == found
    assert ModelGraph(gm).embedding.vocabulary == 100


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_pooler_is_no_head(name):
    model = view(name)
    assert model.head is None
    assert (model.embedding is None) == (name == "vit")


def test_decode():
    model = later_view("llama")
    assert sizes_of(model.head.logits) == (1, 1, 100)
    assert sizes_of(model.embedding.node) == (1, 1, 64)


def test_static_shapes():
    assert sizes_of(view("llama", dynamic=False).head.logits) == (2, LENGTH, 100)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama", "embedding 100 x 64, final rms norm, LM head 100 x 64"),
        ("gpt2", "embedding 100 x 64, final layer norm, tied LM head 100 x 64"),
        ("bert", "embedding 100 x 64"),
        ("vit", ""),
    ],
)
def test_both_ends_as_text(name, text):
    assert ends_text(view(name)) == text


def test_the_report_names_both_ends():
    copy = copy_module(view("llama").gm)
    report, _ = rewrite(copy, parse_options({"config": "structured-mask"}))
    assert report.as_dict()["ends"] == ends_text(view("llama"))


@pytest.mark.parametrize(
    ("name", "adds", "rotary", "cache"),
    [
        ("llama", 2, "half 16 arange", "concat"),
        ("gptj", 1, "interleaved 8 arange", "concat"),
        ("vit", 2, "", ""),
    ],
)
def test_rows_of_the_report(name, adds, rotary, cache):
    rows = structure_rows(view(name))
    found = [(r["residual_adds"], r["rotary"], r["cache"]) for r in rows]
    assert found == [(adds, rotary, cache)] * 2
