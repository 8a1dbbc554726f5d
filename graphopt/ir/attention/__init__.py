"""Attention: found in any spelling, and what it reads."""
