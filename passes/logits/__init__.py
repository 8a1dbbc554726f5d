"""Passes on the logits of several models."""
