"""Several processes that hold one model: this rank's graph, and ranks that agree."""

from graphopt.distributed.local import LocalGraph, localise

__all__ = ["LocalGraph", "localise"]
