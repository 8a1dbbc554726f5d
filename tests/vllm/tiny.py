"""Small models on disk, each with a tokenizer: what vLLM and transformers both load."""

from __future__ import annotations

from pathlib import Path

import torch

TEXT = (
    "the quick brown fox jumps over the lazy dog while seven wizards mix a potion of "
    "jade and quartz; every good boy does fine and the cat sat on the mat "
)


def save(folder: Path, seed: int = 0, layers: int = 2, hidden: int = 128) -> Path:
    """Save a random Llama of ``layers`` layers; the same tokenizer for every seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=["<unk>"])
    made.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
