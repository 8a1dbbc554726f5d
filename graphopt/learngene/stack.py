"""The list of layers inside a model, found by its shape and not by its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from graphopt.errors import ModelError

_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class LayerStack:
    """The layers of ``model``: the children of the list module at ``path``."""

    model: nn.Module
    path: str
    layers: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def name(self, index: int, parameter: str) -> str:
        """Return the name in the model of a layer's parameter."""
        prefix = f"{self.path}." if self.path else ""
        return f"{prefix}{index}.{parameter}"

    def parameters(self) -> list[str]:
        """Return the names of the parameters of a layer, within it."""
        return [name for name, _ in _parameters(self.layers[0])]


def find_stack(model: nn.Module, path: str | None = None) -> LayerStack:
    """Return the layers of ``model``: the list of alike modules with most parameters.

    Alike are modules of one class whose parameters have the same names and shapes.
    ``path`` names another list (the tower of a vision-language model). Raises
    ModelError where there is none, or where its modules are not alike.
    """
    if path is not None:
        return _at(model, path)
    best: LayerStack | None = None
    most = 0
    for name, module in model.named_modules():
        if isinstance(module, _LISTS) and len(module) > 1 and not _difference(module):
            count = sum(p.numel() for layer in module for _, p in _parameters(layer))
            if count > most:  # of nested lists the outer one is met first
                best, most = LayerStack(model, name, tuple(module)), count
    if best is None:
        raise ModelError(
            f"{type(model).__name__}: no list of two or more layers that are alike was "
            "found; name it with layers='path.to.the.list'"
        )
    return best


def _at(model: nn.Module, path: str) -> LayerStack:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{type(model).__name__} has no module '{path}'") from None
    if not isinstance(module, _LISTS) or not len(module):
        raise ModelError(f"'{path}' is no list of layers but a {type(module).__name__}")
    if difference := _difference(module):
        raise ModelError(f"'{path}': {difference}, so its layers cannot share them")
    return LayerStack(model, path, tuple(module))


def _difference(layers: nn.ModuleList | nn.Sequential) -> str:
    """Say how a list's modules differ; nothing where they are alike."""
    first, *rest = layers
    wanted = {name: p.shape for name, p in _parameters(first)}
    if not wanted:
        return "its modules have no parameters"
    for index, layer in enumerate(rest, 1):
        if type(layer) is not type(first):
            kinds = f"{type(first).__name__} and {type(layer).__name__}"
            return f"modules 0 and {index} are a {kinds}"
        found = {name: p.shape for name, p in _parameters(layer)}
        if found != wanted:
            names = sorted(n for n in found | wanted if found.get(n) != wanted.get(n))
            return f"modules 0 and {index} differ in {', '.join(names[:3])}"
    return ""


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def stored_parameters(model: nn.Module) -> int:
    """Return how many numbers the parameters hold, each shared one once."""
    return sum(p.numel() for p in model.parameters())
