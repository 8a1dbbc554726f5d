"""Run single nodes on fake tensors of chosen sizes; equal calls are run once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.ir.match import is_mutating, is_own, raw_name


class FakeRuns:
    """Infers shapes under a fake mode of its own: no symbols, no guards, no data.

    Tensors with the same sizes, strides, dtype and device are one object, so that
    identity tells whether two results have the same form. Layers repeat, so that most
    calls of a deep model are found among those already made. ``watch`` is entered for
    each call of an operator that is not graphopt's own; what it raises, `call` does.
    """

    def __init__(self, watch: AbstractContextManager[Any] | None = None) -> None:
        self._mode = _compat.new_fake_mode()
        self._watch = watch or nullcontext()
        self._tensors: dict[Any, torch.Tensor] = {}
        self._results: dict[Any, Any] = {}

    def tensor(
        self,
        like: torch.Tensor,
        sizes: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Return a fake tensor of ``sizes``, contiguous or with ``strides``.

        It has the dtype and the device of ``like``.
        """
        with self._mode:
            made = torch.empty(sizes, dtype=like.dtype, device=like.device)
            if strides is not None and strides != made.stride():
                made = made.as_strided(sizes, strides)
        return self._one(made)

    def attribute(self, gm: fx.GraphModule, path: str) -> Any:
        """Return an attribute of ``gm``: a tensor as a fake one, others as they are."""
        found: Any = gm
        for name in path.split("."):
            found = getattr(found, name)
        if isinstance(found, torch.Tensor):
            return self.tensor(found, tuple(found.shape), found.stride())
        return found

    def _one(self, tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        return self._tensors.setdefault(key, tensor)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Return the value of ``node`` for ``args``, or raise what it raises."""
        key = (node.op, node.target, _key(args), _key(kwargs))
        if key not in self._results:
            self._results[key] = self._run(node, args, kwargs)
        result = self._results[key]
        if isinstance(result, Exception):
            raise result
        return result

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            watch = nullcontext() if is_own(node) else self._watch
            with _compat.trying_fakes(self._mode), watch:
                if is_mutating(node):
                    return self._mutate(node, args, kwargs)
                result = apply(node, args, kwargs)
            return fx.node.map_aggregate(_plain(result), self._shared)
        except Exception as error:
            return error

    def _shared(self, leaf: Any) -> Any:
        return self._one(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def _mutate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A write keeps the form of its target; one that changes it is refused.

        Tensors are shared between nodes here, so the call gets copies.
        """
        if raw_name(node) == "setitem":
            _check_written(*args)
        copies = fx.node.map_aggregate(args, _copy)
        result = apply(node, copies, fx.node.map_aggregate(kwargs, _copy))
        if isinstance(args[0], torch.Tensor) and args[0].shape != copies[0].shape:
            raise NotImplementedError("an in-place operator that changes a shape")
        return fx.node.map_aggregate(_plain(result), self._shared)


def apply(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Call what ``node`` calls, on ``args`` and ``kwargs``."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _check_written(target: torch.Tensor, index: Any, value: Any) -> None:
    """Raise unless ``value`` broadcasts to ``target[index]``.

    On fake tensors a write through tensor indices does not check it.
    """
    if isinstance(value, torch.Tensor):
        value.detach().expand(target[index].shape)


def _copy(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _plain(value: Any) -> Any:
    """Named tuples such as topk's become tuples, which map_aggregate can rebuild."""
    return tuple(value) if isinstance(value, tuple) else value


def _key(value: Any) -> Any:
    """A key in which 1, 1.0 and True, and a tuple and a list, are different."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, (tuple, list)):
        return (isinstance(value, tuple), *map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, slice):
        return (slice, _key(value.start), _key(value.stop), _key(value.step))
    return (type(value), value)
