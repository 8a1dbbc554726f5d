"""Operators on tokens: score them, choose those that stay, take them.

All are built of plain operators and decomposed wherever they are traced. A score or an
index is always of one batch row's own tokens.
"""

from graphopt.ops.tokens.keep import keep_tokens
from graphopt.ops.tokens.pool import pool_places, pool_tokens
from graphopt.ops.tokens.scores import spread_scores, token_scores
from graphopt.ops.tokens.take import take_tokens

__all__ = [
    "keep_tokens",
    "pool_places",
    "pool_tokens",
    "spread_scores",
    "take_tokens",
    "token_scores",
]
