"""The sizes of pages, which every kernel on paged keys and values has printed in."""

from __future__ import annotations

PAGE = 64  # tokens of a page
LOGICAL = 16  # tokens that have statistics of their own
