"""Models whose layers are to be shared: families of transformers, and plain modules."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from tests.models import token_ids

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_WORDS: dict[str, Any] = {**_SIZES, "vocab_size": 100, "num_key_value_heads": 2}
_IMAGES: dict[str, Any] = {**_SIZES, "image_size": 8, "patch_size": 4, "num_labels": 10}
_KINDS = ["sliding_attention", "full_attention"] * 2


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **tokens, vocab_size=100))


def _gemma3() -> nn.Module:
    sizes = {**_WORDS, "head_dim": 8, "sliding_window": 4, "layer_types": _KINDS}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes))


class Residual(nn.Module):
    """A plain layer that knows its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).tanh()


class Plain(nn.Module):
    """A classifier that is no transformers model."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(Residual(i) for i in range(depth)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**_WORDS, tie_word_embeddings=True)
    ),
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_WORDS, num_local_experts=4)
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_IMAGES)),
    "deit": lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**_IMAGES)),
    "plain": Plain,
}


def made(name: str) -> nn.Module:
    """Return a random model of four layers, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def outputs(model: nn.Module) -> Tensor:
    """Return the logits of the same inputs for every model of a kind."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if isinstance(model, Plain):
            return model(torch.rand(6, 8, generator=generator))
        if model.main_input_name == "pixel_values":
            return model(torch.rand(6, 3, 8, 8, generator=generator)).logits
        return model(token_ids(2, 9), use_cache=False).logits
