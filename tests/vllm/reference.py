"""The same rewrites in transformers, made another way: what vLLM is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import graphopt
from tests.rewriting import rewritten

Prompts = list[list[int]]
Edit = Callable[[nn.Module], None]


def greedy(folder: Path, prompts: Prompts, tokens: int, edit: Edit | None = None):
    """Return the likeliest ``tokens`` behind each prompt, the whole text read anew."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if edit is not None:
        edit(model)
    found = []
    for prompt in prompts:
        model.prompt_len = len(prompt)
        found.append(continued(lambda ids: model(ids).logits, prompt, tokens))
    return found


@torch.no_grad()
def continued(logits_of, prompt: list[int], tokens: int) -> list[int]:
    """Return the likeliest ``tokens`` by ``logits_of`` ids [1, S]."""
    ids = list(prompt)
    for _ in range(tokens):
        logits = logits_of(torch.tensor([ids]))[0, -1].float()
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-3, "a near tie says nothing: take other prompts"
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


class _Closed(nn.Module):
    """An activation whose values up to ``threshold`` count as zero."""

    def __init__(self, inner: nn.Module, threshold: float) -> None:
        super().__init__()
        self.inner, self.threshold = inner, threshold

    def forward(self, x):
        value = self.inner(x)
        return value.where(value.abs() > self.threshold, 0)


def close_gates(model: nn.Module, thresholds: list[float]) -> None:
    """CATS: neurons whose gate is nearly closed are left out, of every token."""
    for layer, threshold in zip(model.model.layers, thresholds, strict=True):
        layer.mlp.act_fn = _Closed(layer.mlp.act_fn, threshold)


def drop_inputs(model: nn.Module, thresholds: dict[str, float]) -> None:
    """TEAL: inputs of the named linears up to a threshold count as zero."""
    for name, threshold in thresholds.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        linear.register_forward_pre_hook(
            lambda _, inputs, t=threshold: inputs[0].where(inputs[0].abs() > t, 0)
        )


def code_linears(model: nn.Module) -> None:
    """int8: weights by one scale a row, inputs by one a token, products exact."""
    for layer in model.model.layers:
        for linear in layer.modules():
            if isinstance(linear, nn.Linear):
                linear.forward = _coded(linear)


def _coded(linear: nn.Linear):
    codes, scale = _rounded(linear.weight.detach())

    def forward(x):
        inner, step = _rounded(x)
        return ((inner.double() @ codes.double().T) * step * scale.squeeze(-1)).float()

    return forward


def _rounded(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127), scale


def see_window(model: nn.Module, sink: int, window: int) -> None:
    """A-shape: a prompt's queries see first and last tokens, those of steps see all."""

    def mask(tokens: int) -> torch.Tensor:
        q, k = torch.arange(tokens)[:, None], torch.arange(tokens)
        near = (k < sink) | (k > q - window) | (q >= model.prompt_len)
        hidden = ~(near & (k <= q))
        return torch.zeros(tokens, tokens).masked_fill(hidden, -torch.inf)[None, None]

    inner = model.model.forward

    def forward(input_ids, attention_mask=None, **more):
        seen = mask(input_ids.shape[1])
        return inner(input_ids, attention_mask=seen, **more)

    model.model.forward = forward


def by_steps(folder: Path, config: str, prompts: Prompts, tokens: int, edit=None):
    """Return the likeliest ``tokens``, decoded one by one with a `graphopt.Cache`.

    The graphs are those that the passes of ``config`` make in transformers.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if edit is not None:
        edit(model)
    fast, found = rewritten(model, config, copied=False), []
    for prompt in prompts:
        cache = graphopt.Cache.from_config(config, max_tokens=512)
        ids, past = list(prompt), 0

        def logits_of(whole, cache=cache):
            nonlocal past
            new, past = whole[:, past:], whole.shape[1]
            return fast(new, past_key_values=cache).logits

        found.append(continued(logits_of, ids, tokens))
    return found
