"""Operators on the logits of several models."""

from graphopt.ops.logits.combine import combine_logits
from graphopt.ops.logits.fused import combine_sample
from graphopt.ops.logits.sample import nucleus, sample_logits

__all__ = ["combine_logits", "combine_sample", "nucleus", "sample_logits"]
