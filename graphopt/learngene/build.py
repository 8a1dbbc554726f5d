"""The auxiliary model: layers that share their parameters by stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from graphopt.errors import ConfigError
from graphopt.learngene.depth import with_depth
from graphopt.learngene.stack import LayerStack, find_stack
from graphopt.learngene.tying import StagePlan, is_transformers, plan_of, tie

Init = Literal["first", "mean", "random"]
Givers = Callable[[int, str], Sequence[int]]


def build(
    model: nn.Module,
    stages: Sequence[int],
    *,
    untied: Sequence[str] = (),
    init: Init = "first",
    seed: int = 0,
    layers: str | None = None,
) -> nn.Module:
    """Return the auxiliary model of ``model`` with so many layers in each stage.

    It may be deeper or shallower than ``model``: its layer j is taken from the layer
    floor(j * depth of model / sum(stages)). With ``init`` "first" a stage begins with
    the values of its first layer, with "mean" with the mean of its layers'; "random"
    makes the whole model anew from ``seed``, as the paper trains it. ``untied`` are
    patterns of parameter names within a layer that are not shared. ``model`` stays as
    it is. Raises ModelError for a model without alike layers, ConfigError for stages or
    patterns that do not fit.
    """
    stack = find_stack(model, layers)
    if plan_of(model) is not None:
        raise ConfigError("the model's layers share by stages already; expand it first")
    plan = StagePlan(tuple(stages), stack.path, tuple(untied))
    plan.check(stack)
    if init not in ("first", "mean", "random"):
        raise ConfigError(f"init '{init}': use first, mean or random")
    if init == "random" and not is_transformers(model):
        raise ConfigError("init = random needs a model that is made from a config")
    sources = [j * len(stack) // plan.depth for j in range(plan.depth)]

    def own(index: int) -> list[int]:
        return [sources[index]]

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = with_depth(stack, sources, plan)
    if not is_transformers(model):
        tie(made, stages, untied=untied, layers=stack.path)
    if init != "random":
        shared = _givers(plan, sources, init)
        fill(made, stack, lambda i, name: own(i) if plan.keeps(name) else shared[i])
    return made


def _givers(plan: StagePlan, sources: Sequence[int], init: Init) -> list[list[int]]:
    """Return for each new layer the layers whose mean its shared values are."""
    stages = plan.stage_of()
    if init == "first":
        return [[sources[stages.index(stage)]] for stage in stages]
    return [
        [s for s, other in zip(sources, stages, strict=True) if other == stage]
        for stage in stages
    ]


def fill(made: nn.Module, stack: LayerStack, givers: Givers) -> None:
    """Copy all values of ``stack.model``; those of layers as ``givers`` say.

    ``givers(i, name)`` are the layers whose mean layer i's tensor ``name`` is. What is
    shared is written once, with its first layer.
    """
    given = stack.model.state_dict()
    prefix = f"{stack.path}." if stack.path else ""
    written = set[int]()
    with torch.no_grad():
        for name, target in made.state_dict(keep_vars=True).items():
            if id(target) not in written:
                target.copy_(_value(name, given, prefix, givers))
                written.add(id(target))


def _value(name: str, given: dict[str, Tensor], prefix: str, givers: Givers) -> Tensor:
    if not name.startswith(prefix):
        return given[name]
    index, _, rest = name.removeprefix(prefix).partition(".")
    values = [given[f"{prefix}{i}.{rest}"] for i in givers(int(index), rest)]
    if len(values) == 1 or not values[0].is_floating_point():
        return values[0]
    return torch.stack(values).mean(0)


def even_stages(depth: int, count: int) -> list[int]:
    """Return ``count`` stages of ``depth`` layers; the middle ones are the longer.

    even_stages(16, 5) is the paper's [3, 3, 4, 3, 3].
    """
    if not 1 <= count <= depth:
        raise ConfigError(f"{depth} layers make 1 to {depth} stages, not {count}")
    least, more = divmod(depth, count)
    start = (count - more) // 2
    return [least + (start <= i < start + more) for i in range(count)]
