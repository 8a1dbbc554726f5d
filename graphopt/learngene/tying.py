"""Layers that share parameters by stages: modules apart, each parameter once.

Modules stay one a layer, so that each keeps its place (``layer_idx``, its slot of the
key-value cache, its kind of attention, its drop-path rate); only the parameters in them
are the same objects. A transformers model gets a class that knows so: transformers then
saves each shared tensor once and shares it again when it loads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from torch import nn

from graphopt.errors import ConfigError, ModelError
from graphopt.learngene.stack import LayerStack, find_stack

CONFIG_KEY = "learngene"  # of a config: the plan as a dictionary


@dataclass(frozen=True)
class StagePlan:
    """``stages``: layers of each stage; ``layers``: where the list of them is.

    ``untied`` are patterns of the names of parameters within a layer (``*norm*``,
    ``mlp.*``) that each layer keeps for itself.
    """

    stages: tuple[int, ...]
    layers: str
    untied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages or min(self.stages) < 1:
            raise ConfigError(
                f"stages {list(self.stages)}: give one or more layers for each stage"
            )

    @property
    def depth(self) -> int:
        """Return the number of layers."""
        return sum(self.stages)

    def stage_of(self) -> list[int]:
        """Return the stage of each layer: [0, 0, 1] for stages of two and one."""
        return [s for s, size in enumerate(self.stages) for _ in range(size)]

    def first_of(self) -> list[int]:
        """Return for each layer the first layer of its stage."""
        stages = self.stage_of()
        return [stages.index(stage) for stage in stages]

    def ties(self, stack: LayerStack) -> dict[str, str]:
        """Return the name that each parameter which is not its own stands for."""
        if len(stack) != self.depth:
            raise ModelError(
                f"stages {list(self.stages)} are of {self.depth} layers, "
                f"'{stack.path}' has {len(stack)}"
            )
        shared = [n for n in stack.parameters() if not self.keeps(n)]
        return {
            stack.name(index, name): stack.name(first, name)
            for index, first in enumerate(self.first_of())
            for name in shared
            if index != first
        }

    def keeps(self, name: str) -> bool:
        """Tell whether each layer has its own parameter ``name``."""
        return any(fnmatchcase(name, pattern) for pattern in self.untied)

    def check(self, stack: LayerStack) -> None:
        """Raise ConfigError for a pattern that fits no parameter."""
        for pattern in self.untied:
            if not any(fnmatchcase(name, pattern) for name in stack.parameters()):
                raise ConfigError(
                    f"untied '{pattern}' fits no parameter of a layer; there are: "
                    f"{', '.join(stack.parameters())}"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        plain = asdict(self)
        return plain | {"stages": list(self.stages), "untied": list(self.untied)}


def tie(
    model: nn.Module,
    stages: Sequence[int],
    *,
    untied: Sequence[str] = (),
    layers: str | None = None,
) -> StagePlan:
    """Let the layers of each stage hold the parameters of its first one, in place.

    A transformers model also gets the class and the config by which it is saved and
    loaded so. Raises ModelError or ConfigError for stages that do not fit.
    """
    stack = find_stack(model, layers)
    plan = StagePlan(tuple(stages), stack.path, tuple(untied))
    plan.check(stack)
    for name, canonical in plan.ties(stack).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(canonical))
    _remember(model, plan, plan.ties(stack))
    return plan


def is_transformers(model: nn.Module) -> bool:
    """Tell whether ``model`` is made from a config, as transformers' are."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def _remember(model: Any, plan: StagePlan, ties: dict[str, str]) -> None:
    if not is_transformers(model):
        model.__dict__[CONFIG_KEY] = plan
        return
    setattr(model.config, CONFIG_KEY, plan.as_dict())
    cls: Any = type(model)
    model.__class__ = tied_class(cls)
    model.all_tied_weights_keys.update(ties)


def plan_of(model: nn.Module) -> StagePlan | None:
    """Return by what plan a model's layers share parameters, or None."""
    return model.__dict__.get(CONFIG_KEY) or plan_in(getattr(model, "config", None))


def plan_in(config: Any) -> StagePlan | None:
    """Return the plan that a transformers config holds, or None."""
    plain = getattr(config, CONFIG_KEY, None)
    if plain is None:
        return None
    sizes, untied = tuple(plain["stages"]), tuple(plain["untied"])
    return StagePlan(sizes, plain["layers"], untied)


@cache
def tied_class(cls: Any) -> Any:
    """Return the class of ``cls`` models that share by their config's plan."""

    class Tied(cls):
        untied_class = cls

        def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> Any:
            """Return what transformers ties, and the layers by stages."""
            known = super().get_expanded_tied_weights_keys(all_submodels)
            plan = plan_in(self.config)
            assert plan is not None
            return {**known, **plan.ties(find_stack(self, plan.layers))}

        def _adjust_bias(self, module: Any, source: Any) -> None:
            """Leave biases of layers alone: they are as long as they were made.

            transformers pads that of a tied head to the rows of its weight, which in a
            layer may be transposed.
            """
            plan = plan_in(self.config)
            assert plan is not None
            layers = self.get_submodule(plan.layers)
            if not any(module is part for part in layers.modules()):
                super()._adjust_bias(module, source)

        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            """Save each shared tensor once."""
            plan = plan_in(self.config)
            assert plan is not None
            ties = plan.ties(find_stack(self, plan.layers))
            exact = {f"^{re.escape(n)}$": other for n, other in ties.items()}
            known: Any = getattr(self, "_tied_weights_keys", None)
            # Read as patterns, and only where tensors that are one are left out.
            self._tied_weights_keys = {**(known or {}), **exact}
            try:
                return super().save_pretrained(*args, **kwargs)
            finally:
                self._tied_weights_keys = known

    # The name goes into config.json: what is saved is a model of the class.
    Tied.__name__, Tied.__qualname__ = cls.__name__, cls.__qualname__
    Tied.__module__ = cls.__module__
    return Tied


def untied_class(model: nn.Module) -> type[Any]:
    """Return the class of ``model`` without tied layers."""
    cls = type(model)
    return getattr(cls, "untied_class", cls)
