"""Several language models as one: logit arithmetic (EFT, proxy-tuning)."""

from graphopt.ensembles.build import ensemble
from graphopt.ensembles.cache import EnsembleCache
from graphopt.ensembles.lora import with_adapter, with_low_rank
from graphopt.ensembles.model import Ensemble, EnsembleOutput
from graphopt.ensembles.speculative import SpeculativeOutput, speculate

__all__ = [
    "Ensemble",
    "EnsembleCache",
    "EnsembleOutput",
    "SpeculativeOutput",
    "ensemble",
    "speculate",
    "with_adapter",
    "with_low_rank",
]
