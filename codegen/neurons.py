"""What kernels and operators on neurons agree on."""

from __future__ import annotations

PARTS = 10_000
"""Shares of a token's neurons are counted in parts of so many: no float rounds."""
