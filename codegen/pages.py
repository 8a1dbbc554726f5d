"""The sizes of pages, which every kernel on paged keys and values has printed in."""

from __future__ import annotations

import torch

PAGE = 64  # tokens of a page
LOGICAL = 16  # tokens that have statistics of their own
# Standard deviations about the mean key that stand for the part's keys. A query's
# product with 64 channels of it is then about one deviation of the products above
# their mean, where the least and the greatest of each channel would be far above any.
SPREAD = 0.125


def width(pool: torch.Tensor) -> int:
    """Return the channels of a token: codes of four bits lie two to a byte."""
    return pool.shape[-1] * (2 if pool.dtype == torch.uint8 else 1)
