"""Passes over the tokens of whole prompts: packed, and in chunks."""
