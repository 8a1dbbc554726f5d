"""Tiny random vision-language models, and prompts with images for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.models import padding_mask

IMAGE = 99  # the token that stands for one vision token
LAYERS = 3
HIDDEN = 64
SIDE = 6  # patches of an image each way: four windows of 3 x 3
PATCHES = SIDE * SIDE
_PATCH = 4  # pixels
_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "initializer_range": 0.3,  # attention that tells tokens apart
}
_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE * _PATCH,
    "patch_size": _PATCH,
    "projection_dim": 32,
    "initializer_range": 0.3,
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_MARKS = {"vision_start_token_id": 97, "vision_end_token_id": 98, "video_token_id": 96}


def _llava() -> nn.Module:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
    )
    return tf.LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    size = SIDE * _PATCH
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_CLIP),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[size, 2 * size], [2 * size, size]],
    )
    return tf.LlavaNextForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = tf.Qwen2VLConfig(
        text_config={**_TEXT, **tokens, "rope_parameters": _MROPE},
        vision_config={**vision, "mlp_ratio": 2, "patch_size": _PATCH},
        image_token_id=IMAGE,
        **_MARKS,
    )
    return tf.Qwen2VLForConditionalGeneration(config)


_FACTORIES: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
}


def vision_model(name: str) -> nn.Module:
    """Return a new float64 model in eval mode, the same weights in each call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return _FACTORIES[name]().eval().double()


def prompt(
    lengths: Sequence[int],
    images: Sequence[Sequence[int]],
    vision: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Return ids [B, S] and attention_mask of rows padded on the left.

    Row i has ``lengths[i]`` tokens, and ``vision`` vision tokens from each place of
    ``images[i]`` on, counted without the padding.
    """
    generator = torch.Generator().manual_seed(seed)
    total = max(lengths)
    ids = torch.randint(3, 96, (len(lengths), total), generator=generator)
    for row, (length, places) in enumerate(zip(lengths, images, strict=True)):
        for place in places:
            first = total - length + place
            ids[row, first : first + vision] = IMAGE
    return {"input_ids": ids, "attention_mask": padding_mask(list(lengths), total)}


def pixels(images: int, seed: int = 0) -> torch.Tensor:
    """Return random pixels [images, 3, H, W], float64."""
    generator = torch.Generator().manual_seed(seed)
    size = SIDE * _PATCH
    return torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64)


def encoded(images: int, vision: int, seed: int = 0) -> dict[str, Any]:
    """Return the argument with the features of images that were encoded before."""
    generator = torch.Generator().manual_seed(seed)
    features = tuple(
        torch.randn(vision, HIDDEN, generator=generator, dtype=torch.float64)
        for _ in range(images)
    )
    output = BaseModelOutputWithPooling(pooler_output=features)
    return {"mm_encoder_outputs": {"image": output}}
