"""The residual stream, and the layers and ends of a model along it."""
