"""The neurons that a cache keeps, without a compiled model: rows, bytes, clusters."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.cli.cluster import count_passages
from graphopt.errors import ConfigError
from graphopt.runtime.neurons import find_ffn_shapes
from graphopt.runtime.neurons.clusters import Clusters, cluster_texts, read_clusters
from tests.models import TINY, token_ids
from tests.ops.neurons import counts_by_hand
from tests.passes.neuron_oracle import downs, shallow

# gated, fused, bias of up, of gate, stored as [inputs, outputs]
SHAPES = {
    "llama": (True, False, False, False, False),
    "gemma3": (True, False, False, False, False),
    "phi3": (True, True, False, False, False),
    "opt": (False, False, True, False, False),
    "gpt2": (False, False, True, False, True),
    "gpt_neox": (False, False, True, False, False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_networks(name):
    found = find_ffn_shapes(TINY[name]())
    assert len(found) == 2
    gated, fused, *rest = SHAPES[name]
    for shape in found:
        assert (shape.gated or shape.fused, shape.fused) == (gated, fused)
        assert [shape.up_bias, shape.gate_bias, shape.transposed] == rest
        assert (shape.hidden_size, shape.neurons) in ((64, 128), (64, 256))


def test_experts_are_no_network():
    assert find_ffn_shapes(TINY["mixtral"]()) == [None, None]


def made(name, rows, batch=3):
    """A cache with ``batch`` rows, whose buffers hold random numbers."""
    model = TINY[name]()
    text = f"neuron-mask{{layers=[0,1],rows={rows},keep=0.2}}"
    cache = graphopt.Cache.from_config(text, model)
    with torch.no_grad():
        model(token_ids(batch, 9), past_key_values=cache)
    generator = torch.Generator().manual_seed(1)
    for tensor in cache.neurons.tensors():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
        else:
            tensor.random_(0, 9, generator=generator)
    return cache


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_rows_follow_their_tokens(name):
    cache = made(name, "each")
    before = [t.clone() for t in cache.neurons.tensors()]
    bytes_of_three = sum(t.nbytes for t in before)
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    moved = cache.neurons.tensors()
    assert all(torch.equal(a, b[[1, 1, 2]]) for a, b in zip(moved, before, strict=True))
    cache.batch_select_indices(torch.tensor([2]))
    alone = cache.neurons.tensors()
    assert all(
        torch.equal(a, b[2].view_as(a)) for a, b in zip(alone, before, strict=True)
    )
    assert sum(t.nbytes for t in alone) * 3 == bytes_of_three
    cache.batch_repeat_interleave(2)
    again = cache.neurons.tensors()
    assert all(torch.equal(a, b[[2, 2]]) for a, b in zip(again, before, strict=True))


def test_rows_that_choose_alike_are_not_copied():
    cache = made("llama", "each")
    for layer in cache.neurons.layers.values():
        layer.indices.copy_(layer.indices[:1].expand(3, -1))
        layer.counts.copy_(layer.counts[:1].expand(3, -1))
    places = [t.data_ptr() for t in cache.neurons.tensors()]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert [t.data_ptr() for t in cache.neurons.tensors()] == places


def test_one_choice_serves_all_rows():
    cache = made("llama", "union")
    before = [(t, t.clone()) for t in cache.neurons.tensors()]
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.crop(-2)
    for (tensor, kept), now in zip(before, cache.neurons.tensors(), strict=True):
        assert now is tensor
        assert torch.equal(now, kept)
    cache.reset()
    chosen = [layer.indices for layer in cache.neurons.layers.values()]
    assert all((indices == -1).all() for indices in chosen)
    assert cache.nbytes > sum(t.nbytes for t in cache.neurons.tensors()) > 0


def texts(seed):
    """Counts of 30 texts of three kinds, int32 [30, 40]."""
    torch.manual_seed(seed)
    kinds = torch.rand(3, 40) ** 4
    kind = torch.randperm(30) % 3
    return (kinds[kind] * torch.randint(50, 500, (30, 1))).int(), kind


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_the_kinds_of_texts(seed):
    counts, kind = texts(seed)
    shares = cluster_texts(counts, 3, seed)
    assert torch.equal(shares, cluster_texts(counts, 3, seed))
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    own = counts / counts.sum(1, keepdim=True)
    found = torch.cdist(own, shares).argmin(1)
    assert (
        len({(a, b) for a, b in zip(found.tolist(), kind.tolist(), strict=True)}) == 3
    )


def test_no_cluster_is_empty():
    counts = torch.ones(6, 8, dtype=torch.int32)
    assert cluster_texts(counts, 4, 0).isfinite().all()


def test_files_of_clusters(tmp_path):
    shares = {0: torch.rand(2, 128), 5: torch.rand(2, 128)}
    path = tmp_path / "some.toml"
    Clusters(shares, {"model": 'a "b"', "seed": 3}).write(path)
    found = read_clusters(path).shares
    assert found.keys() == shares.keys()
    assert all(torch.equal(found[i], shares[i]) for i in shares)
    assert 'model = "a \\"b\\""' in path.read_text()

    def text(layer):
        return {
            "pass": [
                {
                    "name": "neuron-mask",
                    "mode": "similarity",
                    "clusters": str(path),
                    "layers": [layer],
                }
            ]
        }

    cache = graphopt.Cache.from_config(text(0), TINY["llama"]())
    assert torch.equal(cache.neurons.layers[0].shares, shares[0])
    with pytest.raises(ConfigError, match="clusters have none for layer 1"):
        graphopt.Cache.from_config(text(1), TINY["llama"]())
    with pytest.raises(ConfigError, match="128 neurons for layer 0, which has 256"):
        graphopt.Cache.from_config(text(0), TINY["gpt2"]())
    Clusters(shares, {"criterion": "signed"}).write(path)
    with pytest.raises(ConfigError, match="counted with criterion = 'signed'"):
        graphopt.Cache.from_config(text(0), TINY["llama"]())
    path.write_text("seed = 3")
    with pytest.raises(ConfigError, match="no file of clusters"):
        read_clusters(path)
    with pytest.raises(ConfigError, match="cannot read the clusters"):
        read_clusters(tmp_path / "none.toml")


def test_passages_are_counted_as_the_pass_counts():
    model, seen = shallow("llama"), []
    passages = [token_ids(1, 12, seed) for seed in (3, 4)]
    (down,) = downs(model)
    hook = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for ids in passages:
            model(ids)
    hook.remove()
    config = "structured-mask,neuron-mask{token_ratio=0.2,keep=0.001,min_tokens=0}"
    found = count_passages(model, config, passages, lambda *_: None)
    assert found.keys() == {0}
    expected = [counts_by_hand(inner, None, 1, 2000, True)[0] for inner in seen]
    assert torch.equal(found[0], torch.stack(expected))
