"""The dialect: the operators that passes insert; importing it registers them."""

from graphopt.ops.attention import attention
from graphopt.ops.reference import attention_reference

__all__ = ["attention", "attention_reference"]
