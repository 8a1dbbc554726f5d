"""Operators on tokens: score them, choose those that stay, take them.

Built of plain operators and decomposed wherever they are traced, but for those that
write or whose sizes depend on data. A score or an index is always of one batch row's
own tokens.
"""

from graphopt.ops.tokens.cached import real_first, visible_tokens
from graphopt.ops.tokens.dual_scores import dual_from, dual_scores, text_attention
from graphopt.ops.tokens.keep import keep_tokens
from graphopt.ops.tokens.keep_passing import keep_passing
from graphopt.ops.tokens.pack import pack_prompts, take_packed, unpack_tokens
from graphopt.ops.tokens.pool import pool_places, pool_tokens
from graphopt.ops.tokens.pool_vision import pool_vision
from graphopt.ops.tokens.returning import WHOLE
from graphopt.ops.tokens.scores import smooth_scores, spread_scores, token_scores
from graphopt.ops.tokens.take import take_tokens
from graphopt.ops.tokens.vision_ranks import class_keys, vision_ranks
from graphopt.ops.tokens.windows import alike_windows, merge_windows, merged_away

__all__ = [
    "WHOLE",
    "alike_windows",
    "class_keys",
    "dual_from",
    "dual_scores",
    "keep_passing",
    "keep_tokens",
    "merge_windows",
    "merged_away",
    "pack_prompts",
    "pool_places",
    "pool_tokens",
    "pool_vision",
    "real_first",
    "smooth_scores",
    "spread_scores",
    "take_packed",
    "take_tokens",
    "text_attention",
    "token_scores",
    "unpack_tokens",
    "visible_tokens",
    "vision_ranks",
]
