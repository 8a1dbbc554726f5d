"""vLLM's spellings, with operators of its names in its place: sites and rewrites."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.backend import rewrite
from graphopt.calibration import Calibration, InputStatistics
from graphopt.calibration.statistics import Magnitudes
from graphopt.integrations.vllm.spelling import lower, raise_ops
from graphopt.ir.constants import parameter_name
from graphopt.ir.match import op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.options import parse_options

H, HEADS, D, F_DIM = 32, 4, 8, 48
_library = torch.library.Library("vllm", "FRAGMENT")
_norms = torch.library.Library("vllm_ir", "FRAGMENT")
_seen: list[str] = []


def _attend(query, key, value, output, layer_name, kv_cache_dummy_dep=None):
    """Causal attention over the tokens of the call."""
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    output.copy_(found.transpose(0, 1))


def _update(key, value, layer_name):
    _seen.append(layer_name)
    return key.new_empty(0)


def _rms(x, weight, epsilon):
    return F.rms_norm(x, x.shape[-1:], weight, epsilon)


def _added(x, x_residual, weight, epsilon):
    total = x + x_residual
    return _rms(total, weight, epsilon), total.clone()


@pytest.fixture(scope="module", autouse=True)
def _operators():
    if hasattr(torch.ops.vllm, "unified_attention_with_output"):
        yield  # vLLM itself is here
        return
    _library.define(
        "unified_attention_with_output(Tensor query, Tensor key, Tensor value, "
        "Tensor(a!) output, str layer_name, *, Tensor? kv_cache_dummy_dep=None) -> ()"
    )
    _library.define(
        "unified_kv_cache_update(Tensor key, Tensor value, str layer_name) -> Tensor"
    )
    _norms.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor")
    _norms.define(
        "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor weight, float epsilon)"
        " -> (Tensor, Tensor)"
    )
    where = "CompositeExplicitAutograd"
    for library, name, function in (
        (_library, "unified_attention_with_output", _attend),
        (_library, "unified_kv_cache_update", _update),
        (_norms, "rms_norm", _rms),
        (_norms, "fused_add_rms_norm", _added),
    ):
        library.impl(name, function, where)
    fake = torch.library.register_fake
    fake("vllm::unified_attention_with_output", lambda *a, **k: None, lib=_library)
    fake("vllm::unified_kv_cache_update", lambda k, *_: k.new_empty(0), lib=_library)
    fake("vllm_ir::rms_norm", lambda x, *_: torch.empty_like(x), lib=_norms)
    pair = lambda x, *_: (torch.empty_like(x), torch.empty_like(x))  # noqa: E731
    fake("vllm_ir::fused_add_rms_norm", pair, lib=_norms)
    yield


class Norm(nn.Module):
    """A norm that adds the residual before, as vLLM's or spelled out."""

    def __init__(self, fused):
        super().__init__()
        self.weight, self.fused = nn.Parameter(torch.rand(H) + 0.5), fused

    def forward(self, x, residual=None):
        weight = self.weight.data
        if self.fused and residual is None:
            return torch.ops.vllm_ir.rms_norm(x, weight, 1e-6)
        if self.fused:
            return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, 1e-6)
        total = x.float() if residual is None else x.float() + residual.float()
        stream = total.to(x.dtype)
        scaled = total * torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        found = (scaled.to(weight.dtype) * weight).to(x.dtype)
        return found if residual is None else (found, stream)


class Attention(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.qkv_proj = nn.Linear(H, 2 * HEADS * D, bias=False)
        self.o_proj = nn.Linear(HEADS * D, H, bias=False)

    def forward(self, x):
        sizes = [HEADS * D, HEADS * D // 2, HEADS * D // 2]
        q, k, v = self.qkv_proj(x).split(sizes, dim=-1)
        out = torch.empty((x.shape[0], HEADS * D), dtype=x.dtype)
        q, k, v, out = (t.view(-1, t.shape[-1] // D, D) for t in (q, k, v, out))
        written = torch.ops.vllm.unified_kv_cache_update(k, v, self.name)
        torch.ops.vllm.unified_attention_with_output(
            q, k, v, out, self.name, kv_cache_dummy_dep=written
        )
        return self.o_proj(out.view(-1, HEADS * D))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(H, 2 * F_DIM, bias=False)
        self.down_proj = nn.Linear(F_DIM, H, bias=False)
        self.threshold = 0.0

    def forward(self, x):
        x = self.gate_up_proj(x)
        gate = F.silu(x[..., :F_DIM])
        if self.threshold:
            gate = gate.where(gate.abs() > self.threshold, 0)
        return self.down_proj(gate * x[..., F_DIM:])


class Layer(nn.Module):
    def __init__(self, index, fused):
        super().__init__()
        self.self_attn = Attention(f"model.layers.{index}.self_attn.attn")
        self.mlp = Mlp()
        self.input_layernorm, self.post_attention_layernorm = Norm(fused), Norm(fused)

    def forward(self, x, residual):
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x), residual)
        return self.mlp(x), residual


class Model(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, fused) for i in range(2))
        self.norm = Norm(fused)

    def forward(self, x):
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(x, residual)[0]


def captured(model, change):
    """Return ``model`` compiled with ``change`` made to its graph, and the graph."""
    graphs = []

    def backend(gm, inputs):
        change(gm)
        gm.recompile()
        graphs.append(gm)
        return gm.forward

    return torch.compile(model, backend=backend, dynamic=True), graphs


@pytest.fixture(params=[True, False], ids=["fused-norms", "spelled-out"])
def model(request):
    torch.manual_seed(1)
    return Model(request.param).eval().requires_grad_(False)


def test_layers_streams_and_networks_are_found(model):
    x, found = torch.randn(9, H), []

    def look(gm):
        raise_ops(gm)
        found.append(ModelGraph(gm))

    expected = model(x)
    compiled, _ = captured(model, look)
    torch.testing.assert_close(compiled(x), expected)
    graph = found[0]
    assert graph.kind == "mixed"
    assert [site.num_kv_heads for site in graph.attention] == [HEADS // 2] * 2
    assert [len(layer.ffn) for layer in graph.layers] == [1, 1]
    assert [len(layer.linears) for layer in graph.layers] == [4, 4]
    assert [len(layer.residual_adds) for layer in graph.layers] == [2, 2]
    names = [parameter_name(s.weight) for s in graph.layers[1].linears]
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert names == [f"layers.1.{part}.weight" for part in parts]


def test_marks_leave_nothing_behind(model):
    x = torch.randn(5, H)
    expected = model(x)

    def both(gm):
        raise_ops(gm, split_gates=True)
        lower(gm)

    compiled, graphs = captured(model, both)
    _seen.clear()
    torch.testing.assert_close(compiled(x), expected)
    assert _seen == [f"model.layers.{i}.self_attn.attn" for i in range(2)]
    names = [op_name(node) for node in graphs[0].graph.nodes]
    assert names.count("vllm.unified_attention_with_output") == 2
    assert names.count("linear") == 10
    assert "paged_attention" not in names


def test_layers_read_one_set_of_weights(model):
    x = torch.randn(6, H)
    options = parse_options({"config": "weight-tying{stages=[2]}", "strict": True})

    def change(gm):
        raise_ops(gm)
        report, _ = rewrite(gm, options)
        remarks = [r for r in report.all_remarks() if r.pass_name]
        assert [r.kind for r in remarks] == ["applied"]
        assert remarks[0].figures["parameters"] == 6
        lower(gm)

    compiled, _ = captured(model, change)
    found = compiled(x)
    first, second = model.layers
    second.load_state_dict(first.state_dict())
    torch._dynamo.reset()
    torch.testing.assert_close(found, model(x))


class Stage(nn.Module):
    """Layers of a pipeline stage, with the two values that go between stages."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, residual=None):
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x, residual


@pytest.mark.parametrize("first", [0, 1], ids=["first", "middle"])
def test_a_stage_ends_where_the_next_one_adds(model, first):
    stage = Stage(model.layers[first:])
    given = [torch.randn(6, H) for _ in range(1 + first)]
    expected, found = stage(*given), []

    def change(gm):
        raise_ops(gm)
        found.extend(ModelGraph(gm).layers)
        lower(gm)

    compiled, _ = captured(stage, change)
    torch.testing.assert_close(compiled(*given), expected)
    assert len(found) == 2 - first
    assert [len(layer.linears) for layer in found] == [4] * len(found)
    assert [len(layer.residual_adds) for layer in found] == [2] * len(found)


@pytest.fixture
def thresholds(model, tmp_path):
    """Return the path of a calibration by vLLM's parts, of what the model computes."""
    inputs = InputStatistics.of_width(H)
    inputs.add(torch.randn(3, H))
    found = Calibration({"another": inputs})
    for index in range(2):
        gates = Magnitudes()
        gates.add(torch.rand(1000))
        found.gates[f"model.layers.{index}.mlp.down_proj.weight"] = gates
    return found.write(tmp_path / "c")[0]


@pytest.mark.parametrize("tokens", [3, 40], ids=["few", "many"])
def test_neurons_with_closed_gates_are_left_out(model, thresholds, tokens):
    x = torch.randn(tokens, H)
    plain = model(x)
    text = (
        f'neuron-mask{{method=cats,sparsity=0.1,thresholds="{thresholds}",force=true}}'
    )
    options = parse_options({"config": text, "strict": True})

    def change(gm):
        raise_ops(gm, split_gates=True)
        report, _ = rewrite(gm, options)
        assert [r.kind for r in report.all_remarks() if r.pass_name] == ["applied"] * 2
        lower(gm)

    compiled, _ = captured(model, change)
    found = compiled(x)
    read = Calibration.read(thresholds)
    for index, layer in enumerate(model.layers):
        name = f"layers.{index}.mlp.down_proj.weight"
        layer.mlp.threshold = read.threshold("gate", name, 0.1)
    torch._dynamo.reset()
    torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-2
