"""The vocabulary, the tokenizer and the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Phrasing = Literal["long", "short"]

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *(str(digit) for digit in range(10)),
    *("none", "user", "assistant", ":", "?"),
    *("a", "b", "c", "d"),
    *("which", "digit", "is", "in", "cell"),
)
VOCABULARY = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
PAD, BOS, EOS, _, IMAGE = range(len(SPECIAL))

NONE = 10
"""The class of an empty cell; classes 0 to 9 are the digits."""

ANSWERS = tuple(VOCABULARY[w] for w in (*(str(d) for d in range(10)), "none"))
"""Token id of each class's answer."""

IMAGE_TOKENS = 144
LEAD: dict[Phrasing, str] = {"long": "which digit is in ", "short": ""}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: a word a token, ``<s>`` written out in the prompts."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def question(cell: int, phrasing: Phrasing = "long") -> str:
    """Return the question for ``cell`` of 16, row by row: "cell b 3" is the 10th.

    Columns have letters and rows have numbers, as in a spreadsheet.
    """
    row, column = divmod(cell, 4)
    return f"{LEAD[phrasing]}cell {'abcd'[column]} {row + 1} ?"


def prompt(text: str, images: int = 1) -> str:
    """Return a user's turn: ``images`` images, then ``text``; the answer is next.

    Each image takes 144 ``<image>`` tokens, one for each patch.
    """
    places = "<image> " * (IMAGE_TOKENS * images)
    return f"<s> user : {places}{text} assistant :"


def ids(text: str) -> list[int]:
    """Return the token ids of ``text``; KeyError for a word that there is not."""
    return [VOCABULARY[word] for word in text.split()]


def answer_words(tokens: Sequence[int]) -> list[str]:
    """Return the words of token ids."""
    words = list(VOCABULARY)
    return [words[token] for token in tokens]
