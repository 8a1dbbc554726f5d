"""Attention passes."""
