"""Fidelity of patterns: what the benchmark of that name is made of."""
