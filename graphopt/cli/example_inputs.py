"""The inputs of a prefill that is traced: sizes matter, numbers do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Set, transformers does not count placeholders, which would break the graph.
_UNCHECKED = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def example_inputs(model: torch.nn.Module, tokens: int) -> dict[str, Any]:
    """Return the inputs of a prefill of ``tokens`` tokens, batch 1.

    Token ids, pixels for a vision model, both for a model whose config says how many
    tokens of a prompt an image takes (``image_seq_length``, and no grid of tiles): one
    image then, where the prompt is long enough for it.
    """
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        return {"pixel_values": _pixels(config)}
    vocabulary = config.get_text_config().vocab_size
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, vocabulary, (1, tokens))}
    if getattr(model, "can_generate", bool)():
        inputs |= {"use_cache": True, "logits_to_keep": 1}
    if _image_tokens(config) in range(1, tokens + 1):
        inputs["pixel_values"] = _pixels(config.vision_config)
    return inputs


def _image_tokens(config: Any) -> int:
    """Return how many tokens every image takes; 0 where the config does not say."""
    tiles = getattr(config, "image_grid_pinpoints", None)
    known = hasattr(config, "vision_config") and not tiles
    return int(getattr(config, "image_seq_length", None) or 0) if known else 0


def _pixels(config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.rand(1, channels, height, width)


@contextmanager
def encoder_in_graph() -> Iterator[None]:
    """Let images come into the graph of the layers while it lasts."""
    before = os.environ.get(_UNCHECKED)
    os.environ[_UNCHECKED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_UNCHECKED]
        else:
            os.environ[_UNCHECKED] = before
