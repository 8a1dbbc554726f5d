"""Sizes as expressions in the number of tokens."""
