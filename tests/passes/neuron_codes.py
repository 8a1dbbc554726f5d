"""What decoding on core neurons gives with weights in codes: eager, dequantised."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import DynamicCache

from graphopt.ops.int8.weights import quantize_weight
from tests.passes.neuron_oracle import downs, masked, steps


def dequantise(module, kept=None):
    """Give a linear the weight that its codes stand for; ``kept`` [F]: of its inputs.

    The inputs that are not kept, which the hooks make zero, have no say in the scales.
    """
    is_conv = type(module).__name__ == "Conv1D"
    plain = module.weight.detach()
    plain = plain.t() if is_conv else plain
    kept = torch.ones(plain.shape[1], dtype=torch.bool) if kept is None else kept
    codes, scales = quantize_weight(plain[:, kept])
    found = torch.zeros_like(plain)
    found[:, kept] = (codes.double() * scales.double()[:, None]).to(plain.dtype)
    module.weight.data = (found.t() if is_conv else found).contiguous()


def network(model, layer):
    """The linears of a layer's feed-forward network; the down projection is last."""
    down = downs(model)[layer]
    name = next(n for n, module in model.named_modules() if module is down)
    children = model.get_submodule(name.rpartition(".")[0]).children()
    kinds = ("Linear", "Conv1D")
    return [module for module in children if type(module).__name__ in kinds]


def dequantised(model, layers=True):
    """A twin whose linears, without the head, have the weights of their codes."""
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and layers:
            dequantise(module)
    return twin


def decoded_in_codes(twin, given, layer, source, buffers):
    """Logits [B, N + 1, V] of ``twin`` in float64, with ``layer`` masked in decoding.

    Its network then has the weights of ``source``, or of the codes of the chosen ones.
    """
    twin, source = copy.deepcopy(twin).double(), copy.deepcopy(source).double()
    ids, mask, forced = given
    with masked(twin, (layer,), mask.bool()) as state:
        found = steps(twin, ids, mask, forced, DynamicCache())
        logits = [next(found)]
        pairs = zip(network(twin, layer), network(source, layer), strict=True)
        for module, plain in pairs:
            module.weight.data = plain.weight.detach().clone()
            if buffers == "int8":
                is_down = module is downs(twin)[layer]
                dequantise(module, state.kept[layer][0] if is_down else None)
        logits += found
    return torch.stack(logits, 1).float()
