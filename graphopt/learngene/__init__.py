"""Learngenes by stage-wise weight sharing (SWS, Xia et al. 2024, arXiv:2404.16897).

`build` makes the auxiliary model, whose layers share their parameters by stages, from
any transformer; `distil` trains it on a teacher's outputs; `expand` makes models of any
depth from its stages, whose layers have parameters of their own again.
"""

from graphopt.learngene.build import build, even_stages
from graphopt.learngene.evaluation import evaluate
from graphopt.learngene.examples import Examples, read_examples, text_examples
from graphopt.learngene.expand import even_map, expand
from graphopt.learngene.files import load, save
from graphopt.learngene.objective import distillation_loss
from graphopt.learngene.settings import TrainSettings
from graphopt.learngene.stack import LayerStack, find_stack, stored_parameters
from graphopt.learngene.training import Training, distil
from graphopt.learngene.tying import StagePlan, plan_of, tie

__all__ = [
    "Examples",
    "LayerStack",
    "StagePlan",
    "TrainSettings",
    "Training",
    "build",
    "distil",
    "distillation_loss",
    "evaluate",
    "even_map",
    "even_stages",
    "expand",
    "find_stack",
    "load",
    "plan_of",
    "read_examples",
    "save",
    "stored_parameters",
    "text_examples",
    "tie",
]
