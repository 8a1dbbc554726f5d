"""The model: transformers' own LLaVA in small."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from . import text
from .data import CANVAS, PATCH

WEIGHTS = Path(__file__).parent / "weights"
LAYERS = 12


def config(layers: int = LAYERS) -> LlavaConfig:
    """Return the configuration with ``layers`` decoder layers.

    As in LLaVA-1.5 the features come from the layer before the tower's last one; that
    one serves its class token.
    """
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_channels=1,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=96,
    )
    decoder = LlamaConfig(
        vocab_size=len(text.VOCABULARY),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size)
        tie_word_embeddings=False,
        pad_token_id=text.PAD,
        bos_token_id=text.BOS,
        eos_token_id=text.EOS,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=text.IMAGE,
        image_seq_length=text.IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=text.PAD,
        bos_token_id=text.BOS,
        eos_token_id=text.EOS,
    )


def load(
    path: Path = WEIGHTS, dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """Load the trained model in eval mode; the file's weights are float16."""
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype)
    return model.eval()
