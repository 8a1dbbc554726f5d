"""graphopt: graph passes and emitted kernels for transformer inference."""

__version__ = "0.1.0"
