"""Small real tokenizers, made here: one of bytes, one of words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import tokenizers as tk
from transformers import PreTrainedTokenizerFast


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose every token is one byte of UTF-8."""
    model = tk.models.BPE(vocab=byte_vocabulary(), merges=[])
    tokenizer = tk.Tokenizer(model)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )


@cache
def byte_vocabulary() -> dict[str, int]:
    """Return the token of each byte, as byte-level BPE spells it."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    spelt = {byte: chr(byte) for byte in shown}
    spelt |= {byte: chr(256 + at) for at, byte in enumerate(hidden)}
    return {spelt[byte]: byte for byte in range(256)}


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words whose decoder puts spaces between them."""
    vocabulary = {word: at for at, word in enumerate(["?", *words])}
    tokenizer = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
