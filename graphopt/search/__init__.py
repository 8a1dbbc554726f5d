"""Offline searches: which pattern, or which gate, each head of a model gets."""
