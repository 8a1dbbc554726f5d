"""The dialect: the operators that passes insert; importing it registers them."""

from graphopt.ops.append_rows import append_rows
from graphopt.ops.attention import attention
from graphopt.ops.block_list import BlockList
from graphopt.ops.block_selection import select_blocks
from graphopt.ops.int8 import shadow_linear
from graphopt.ops.logits import combine_logits, combine_sample, sample_logits
from graphopt.ops.onednn_linear import onednn_linear
from graphopt.ops.packed import packed_attention
from graphopt.ops.reference import attention_reference
from graphopt.ops.selection import select_vertical_slash
from graphopt.ops.skinny_linear import skinny_linear
from graphopt.ops.sparse_linear import sparse_linear
from graphopt.ops.sparse_up import sparse_up
from graphopt.ops.tokens import keep_tokens, take_tokens, token_scores
from graphopt.ops.visit import visit_attention
from graphopt.ops.visit_list import VisitList

__all__ = [
    "BlockList",
    "VisitList",
    "append_rows",
    "attention",
    "attention_reference",
    "combine_logits",
    "combine_sample",
    "keep_tokens",
    "onednn_linear",
    "packed_attention",
    "sample_logits",
    "select_blocks",
    "select_vertical_slash",
    "shadow_linear",
    "skinny_linear",
    "sparse_linear",
    "sparse_up",
    "take_tokens",
    "token_scores",
    "visit_attention",
]
