"""Training of gates, on tiny models whose heads are known to need far tokens or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from graphopt.errors import ConfigError, ModelError
from graphopt.models import LoadedModel
from graphopt.passes.attention.head_tables import read_table
from graphopt.search import gates as gates_module
from graphopt.search.gated import Gates, gated
from graphopt.search.gates import GateSettings, find_gates, gates_text, rate_share
from graphopt.search.keys import Samples
from graphopt.search.texts import Text
from tests.models import TINY, token_ids
from tests.search.letters import Letters, prose

SETTINGS = GateSettings(
    steps=40, context=420, sink=4, recent=16, keys=2, sparsity_weight=0.01
)
TEXT = Text("prose.txt", prose(2000))


def quiet(what, done, of):
    pass


def known_model():
    """Return a model whose KV head 1 of layer 0 reaches no output: it needs no token.

    All other heads look at random places, far ones too, and write loudly.
    """
    model = TINY["llama"]()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
            layer.self_attn.v_proj.weight.mul_(20)
        model.model.layers[0].self_attn.o_proj.weight[:, 32:] = 0.0
    return LoadedModel(model, Letters(), "tiny")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("gates") / "gates.tsv"
    loaded = known_model()
    gates, losses = find_gates(loaded, TEXT, SETTINGS, path, quiet)
    return path, gates, losses


def test_a_head_without_use_for_far_tokens_gets_the_lowest_gate(trained):
    _, gates, _ = trained
    others = [float(g) for g in gates.flatten()]
    useless = others.pop(1)
    assert useless < 0.6
    assert min(others) > useless + 0.2


def test_training_lowers_the_loss(trained):
    _, _, losses = trained
    assert losses[0] == pytest.approx(0.01, rel=1e-3)  # all gates full: no distance
    assert len(losses) == SETTINGS.steps
    assert losses[-1] < losses[0]


def test_the_pass_reads_the_file(trained):
    path, _, _ = trained
    table = read_table(str(path), 0.25)
    assert table.mismatch(2, 4, 2) is None
    patterns = [[head.pattern for head in row] for row in table.layers]
    assert patterns == [["dense", "streaming"], ["dense", "dense"]]
    assert [p.name for p in path.parent.iterdir()] == ["gates.tsv"]


def test_training_that_is_cut_off_goes_on_to_the_same_gates(
    trained, tmp_path, monkeypatch
):
    out, original = tmp_path / "gates.tsv", gates_module.GateTraining._step

    def breaks_down(self, gates, optimiser, step):
        if step == 25:
            raise KeyboardInterrupt
        return original(self, gates, optimiser, step)

    with monkeypatch.context() as patch:
        patch.setattr(gates_module.GateTraining, "_step", breaks_down)
        with pytest.raises(KeyboardInterrupt):
            find_gates(known_model(), TEXT, SETTINGS, out, quiet)
    with pytest.raises(ConfigError, match="was begun with steps = 40, now it is 41"):
        find_gates(known_model(), TEXT, replace(SETTINGS, steps=41), out, quiet)
    find_gates(known_model(), TEXT, SETTINGS, out, quiet)
    assert out.read_bytes() == trained[0].read_bytes()


def test_full_gates_are_the_model_and_empty_ones_stream():
    model, ids = TINY["llama"](), token_ids(1, 60)
    with torch.no_grad():
        expected = model(ids).logits
        gates = Gates(2, 2, sink=2, recent=8)
        with gated(model, gates):
            full = model(ids, use_cache=False).logits
            gates.alpha.fill_(0.0)
            streaming = model(ids, use_cache=False).logits
            gates.mixed = False
            off = model(ids, use_cache=False).logits
        after = model(ids).logits
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(off, expected)
    assert torch.equal(after, expected)
    assert not torch.allclose(streaming, expected, atol=1e-3)
    # The first rows see all of their past through sink and window.
    torch.testing.assert_close(streaming[:, :10], expected[:, :10])


def test_a_streaming_head_sees_its_first_and_nearest_tokens():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 30, 8), *torch.randn(2, 1, 2, 30, 8)
    gates = Gates(1, 2, sink=3, recent=5)
    module = type("Module", (), {"layer_idx": 0})
    with torch.no_grad():
        gates.alpha.copy_(torch.tensor([[0.0, 0.25]]))
        out, _ = gates.attend(module, q, k, v, None, scaling=0.4)
    seen = torch.zeros(30, 30, dtype=torch.bool)
    for row in range(30):
        for key in range(row + 1):
            seen[row, key] = key < 3 or row - key < 5
    options = {"scale": 0.4, "enable_gqa": True}
    near = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    expected = torch.cat((near[:, :2], 0.25 * full[:, 2:] + 0.75 * near[:, 2:]), 1)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_models_of_other_attention_are_refused(name, tmp_path):
    loaded = LoadedModel(TINY[name](), Letters(), name)
    with pytest.raises(ModelError, match="plain causal attention"):
        find_gates(loaded, TEXT, SETTINGS, tmp_path / "gates.tsv", quiet)


def test_samples_hide_keys_out_of_sight_and_repeat_them():
    ids = Letters()(prose(3000)).input_ids
    samples = Samples(Letters(), ids, context=500, keys=3, near=60)
    drawn, answer = samples.draw("0")
    again, _ = samples.draw("0")
    assert torch.equal(drawn, again)
    assert drawn.shape == (1, 500)
    text = Letters().decode(drawn[0].tolist())
    asked, said = text[:-answer], text[-answer:]
    assert said.count("The pass key of") == 3
    for sentence in said.split(".")[:-1]:
        place = asked.index(sentence.strip())
        assert place + len(sentence) < len(asked) - 60
    assert not torch.equal(drawn, samples.draw("1")[0])


def test_samples_without_room_are_refused():
    ids = Letters()(prose(3000)).input_ids
    with pytest.raises(ConfigError, match=r"--context 200: .* give a longer one"):
        Samples(Letters(), ids, context=200, keys=2, near=100).draw("0")
    with pytest.raises(ConfigError, match=r"the text has 50 tokens"):
        Samples(Letters(), ids[:50], context=600, keys=2, near=16).draw("0")


def test_the_rate_warms_up_and_decays():
    shares = [rate_share(step, 50) for step in range(50)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == 1.0
    assert shares[9:41] == [1.0] * 32
    assert shares[-1] == pytest.approx(0.1)
    assert gates_text(torch.tensor([[1.0, 0.25]])) == "1.0000\t0.2500\n"
