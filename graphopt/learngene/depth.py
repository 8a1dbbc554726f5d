"""A model like another one but for the number of its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from graphopt.errors import ModelError
from graphopt.learngene.stack import LayerStack, find_stack
from graphopt.learngene.tying import (
    CONFIG_KEY,
    StagePlan,
    is_transformers,
    tied_class,
    untied_class,
)


def with_depth(
    stack: LayerStack, sources: Sequence[int], plan: StagePlan | None = None
) -> nn.Module:
    """Return a model of ``len(sources)`` layers; layer i is of the kind of sources[i].

    A transformers model is made from its config with another depth, random as its class
    makes it; heads, widths, norms and their epsilon are the config's, so layers compute
    as they did. With a ``plan`` its layers are tied. Another module is a copy with the
    values of ``sources``. Raises ModelError for a model whose config knows no depth.
    """
    if not is_transformers(stack.model):
        return _copied(stack, sources)
    model = stack.model
    for name in _depth_names(stack):
        config = _config(stack, name, sources)
        setattr(config, CONFIG_KEY, plan and plan.as_dict())
        if plan is None:
            delattr(config, CONFIG_KEY)
        cls: Any = untied_class(model)
        made = (tied_class(cls) if plan else cls)(config)
        if len(find_stack(made, stack.path)) == len(sources):
            return made.to(device=model.device, dtype=model.dtype).train(model.training)
    raise ModelError(
        f"{type(model).__name__}: nothing in its config sets the number of layers of "
        f"'{stack.path}'"
    )


def _owner(stack: LayerStack) -> Any:
    """Return the config of the nearest module around the layers that has one."""
    parts = stack.path.split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1))
    owners = (stack.model.get_submodule(path) for path in paths)
    return next(o.config for o in owners if hasattr(o, "config"))


def _depth_names(stack: LayerStack) -> Iterator[str]:
    """Yield what in the config may be the number of layers, the likeliest first."""
    config = _owner(stack)
    known = ["num_hidden_layers", *sorted(config.to_dict())]
    for name in dict.fromkeys(known):
        counts = "layer" in name or "depth" in name
        value = getattr(config, name, None)
        if counts and isinstance(value, int) and value == len(stack):
            yield name


def _config(stack: LayerStack, depth: str, sources: Sequence[int]) -> Any:
    """Return the model's config with another depth; what it lists by layer follows."""
    memo: dict[int, Any] = {}
    whole = copy.deepcopy(stack.model.config, memo)
    own = memo.get(id(_owner(stack)), whole)
    for name, value in list(vars(own).items()):
        listed = isinstance(value, (list, tuple)) and len(value) == len(stack)
        if listed and "layer" in name:
            setattr(own, name, type(value)(value[i] for i in sources))
    setattr(own, depth, len(sources))
    return whole


def _copied(stack: LayerStack, sources: Sequence[int]) -> nn.Module:
    """Copy a module; each of its new layers is a copy of its own."""
    model = copy.deepcopy(stack.model)
    model.__dict__.pop(CONFIG_KEY, None)
    numbers = _numbers(stack)
    layers = [copy.deepcopy(stack.layers[i]) for i in sources]
    for index, layer in enumerate(layers):
        for path, name in numbers:
            setattr(layer.get_submodule(path), name, index)
    owner, _, leaf = stack.path.rpartition(".")
    kind = type(model.get_submodule(stack.path))
    made = kind(*layers) if issubclass(kind, nn.Sequential) else kind(layers)
    setattr(model.get_submodule(owner), leaf, made)
    return model


def _numbers(stack: LayerStack) -> list[tuple[str, str]]:
    """Return the attributes (module within a layer, name) that hold its number."""
    return [
        (path, name)
        for path, module in stack.layers[0].named_modules()
        for name, value in vars(module).items()
        if type(value) is int and _counts(stack, path, name)
    ]


def _counts(stack: LayerStack, path: str, name: str) -> bool:
    if len(stack) < 2:
        return False
    values = [getattr(x.get_submodule(path), name, None) for x in stack.layers]
    return values == list(range(len(stack)))
