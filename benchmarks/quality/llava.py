"""A random LLaVA in the proportions of LLaVA-1.5, small enough for a CPU."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor

TEXT = 64  # tokens of a prompt beside its image
_IMAGE = 999  # the placeholder; random text has smaller ids
_PATCH = 14


def llava(layers: int = 12, hidden: int = 768, side: int = 24) -> Any:
    """Return a model whose image takes ``side`` x ``side`` tokens; random weights.

    By default the 576 of LLaVA-1.5 and a decoder of 85 million parameters beside its
    embeddings. The tower has a twentieth of the decoder's, as CLIP-L has of Vicuna-7B.
    """
    tower = hidden // 3
    vision = tf.CLIPVisionConfig(
        hidden_size=tower,
        intermediate_size=4 * tower,
        num_hidden_layers=layers // 2 + 1,  # features come from the last but one
        num_attention_heads=4,
        image_size=side * _PATCH,
        patch_size=_PATCH,
        projection_dim=tower,
    )
    text = tf.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=_IMAGE + 1,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=_IMAGE,
        image_seq_length=side**2,
    )
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(config).eval()


def prompt(model: Any) -> dict[str, Tensor]:
    """Return a prompt of one random image between random text, batch 1."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    ids = torch.randint(0, _IMAGE, (1, config.image_seq_length + TEXT))
    ids[:, TEXT // 2 : TEXT // 2 + config.image_seq_length] = _IMAGE
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels}
