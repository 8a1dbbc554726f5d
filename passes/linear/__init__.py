"""Passes on linear layers."""
