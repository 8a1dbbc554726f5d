"""Passes that let tokens drop out on their way through the layers."""
