"""The serving engine: continuous batching of requests over paged keys and values."""

from graphopt.runtime.engine.batch import Executor, Piece, PieceError
from graphopt.runtime.engine.engine import Engine
from graphopt.runtime.engine.handle import Handle, Result
from graphopt.runtime.engine.job import State
from graphopt.runtime.engine.options import EngineOptions
from graphopt.runtime.engine.request import RequestError
from graphopt.runtime.engine.sampling import SamplingParams

__all__ = [
    "Engine",
    "EngineOptions",
    "Executor",
    "Handle",
    "Piece",
    "PieceError",
    "RequestError",
    "Result",
    "SamplingParams",
    "State",
]
