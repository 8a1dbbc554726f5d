"""The dialect: the operators that passes insert; importing it registers them."""

from graphopt.ops.attention import attention
from graphopt.ops.reference import attention_reference
from graphopt.ops.selection import select_vertical_slash
from graphopt.ops.visit import visit_attention
from graphopt.ops.visit_list import VisitList

__all__ = [
    "VisitList",
    "attention",
    "attention_reference",
    "select_vertical_slash",
    "visit_attention",
]
