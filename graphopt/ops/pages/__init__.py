"""Operators on paged keys and values."""

from graphopt.ops.pages.append import append_reference
from graphopt.ops.pages.attention import page_attention_reference
from graphopt.ops.pages.held import Held, PageSet
from graphopt.ops.pages.layout import LOGICAL, PAGE, pages_of
from graphopt.ops.pages.places import place_attention, place_scores, write_tokens
from graphopt.ops.pages.ragged import ragged_page_attention_reference
from graphopt.ops.pages.ragged_append import append_ragged_reference
from graphopt.ops.pages.read import read_reference

__all__ = [
    "LOGICAL",
    "PAGE",
    "Held",
    "PageSet",
    "append_ragged_reference",
    "append_reference",
    "page_attention_reference",
    "pages_of",
    "place_attention",
    "place_scores",
    "ragged_page_attention_reference",
    "read_reference",
    "write_tokens",
]
