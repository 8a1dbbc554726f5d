"""Views of captured graphs, each captured once for all tests that look at it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers as tf
from torch import fx, nn

from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.model_graph import ModelGraph
from tests.models import TINY, capture, prefilled, token_ids

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LENGTH = 9  # tokens of a prompt; no other size of the models below
PAST = 20  # tokens in the cache of a later call
SLOTS = 32  # of a static cache


def _gptj() -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPTJForCausalLM(tf.GPTJConfig(**sizes, rotary_dim=8, vocab_size=100))


def _granite() -> nn.Module:
    scales = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    config = tf.GraniteConfig(**_SIZES, **scales, logits_scaling=8.0)
    return tf.GraniteForCausalLM(config)


def _bart() -> nn.Module:
    names = ("layers", "attention_heads", "ffn_dim")
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in zip(names, (1, 4, 128), strict=True)
    }
    config = tf.BartConfig(**sizes, d_model=64, vocab_size=100)
    return tf.BartForConditionalGeneration(config)


_MORE: dict[str, Callable[[], nn.Module]] = {
    "bart": _bart,
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**_SIZES)),
    "gptj": _gptj,
    "granite": _granite,
}


def build(name: str) -> nn.Module:
    """Return a new model in eval mode, with the same random weights in each call."""
    if name in TINY:
        return TINY[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _MORE[name]().eval()


def inputs_of(name: str, batch: int = 2) -> dict[str, Any]:
    """Return the inputs of a prefill, or of an encoder."""
    if name == "vit":
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    inputs: dict[str, Any] = {"input_ids": token_ids(batch, LENGTH)}
    if name == "bart":
        inputs["decoder_input_ids"] = token_ids(batch, 5, seed=1)
    return inputs if name == "bert" else {**inputs, "use_cache": True}


@functools.cache
def view(name: str, **options: Any) -> ModelGraph:
    """Return the view of the graph of a prefill; ``dynamic`` and inputs in options."""
    dynamic = options.pop("dynamic", True)
    return _captured(build(name), dynamic, **{**inputs_of(name), **options})


@functools.cache
def later_view(name: str, tokens: int = 1, static: bool = False) -> ModelGraph:
    """Return the view of a call with ``tokens`` new tokens and `PAST` cached ones."""
    model = build(name)
    cache = {"past_key_values": _static_cache(model)} if static else {}
    past = prefilled(model, token_ids(1, PAST), **cache)
    return _captured(model, True, input_ids=token_ids(1, tokens), past_key_values=past)


@functools.cache
def static_prefill_view(name: str) -> ModelGraph:
    """Return the view of a prefill into an empty static cache."""
    model = build(name)
    cache, ids = _static_cache(model), token_ids(1, LENGTH)
    return _captured(model, True, input_ids=ids, past_key_values=cache)


@functools.cache
def later_decoder_view(name: str) -> ModelGraph:
    """Return the view of a later call of a decoder that reads an encoder's output."""
    model = build(name)
    with torch.no_grad():
        encoded = model.get_encoder()(token_ids(1, LENGTH))
    inputs = {"encoder_outputs": encoded, "decoder_input_ids": token_ids(1, 1)}
    first = {**inputs, "decoder_input_ids": token_ids(1, 5), "use_cache": True}
    with torch.no_grad():
        past = model(**first).past_key_values
    return _captured(model, True, **inputs, past_key_values=past)


def _static_cache(model: nn.Module) -> Any:
    return tf.StaticCache(config=model.config, max_cache_len=SLOTS)


def _captured(model: nn.Module, dynamic: bool, **inputs: Any) -> ModelGraph:
    graphs = capture(model, dynamic=dynamic, **inputs)
    assert len(graphs) == 1
    fold_float_attributes(graphs[0])
    graphs[0].recompile()
    return ModelGraph(graphs[0])


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.values: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value.clone()
        return value


def values(model: ModelGraph, nodes: Iterable[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """Run the graph on the arguments of its capture; return the values of ``nodes``."""
    recorder = _Recorder(model.gm, set(nodes))
    copies = [
        a.clone() if isinstance(a, torch.Tensor) else a
        for a in model.gm.meta["arguments"]
    ]
    with torch.no_grad():
        recorder.run(*copies)
    return recorder.values
