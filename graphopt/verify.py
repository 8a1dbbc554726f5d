"""Checks of a rewritten graph: structure after every pass, numbers on demand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.collectives import count_collectives

_DATA_SIZE = re.compile(r"\bu\d+\b")  # as torch names one; each run makes a new one


def signature(gm: fx.GraphModule) -> list[Any]:
    """Return the value of every output of ``gm``, as known from its tracing.

    Values, not their text: where a pass finds that two symbols are one size, those of
    before have its name too.
    """
    output = next(n for n in gm.graph.nodes if n.op == "output")
    return [n.meta.get("example_value") for n in output.all_input_nodes]


def _describe(value: Any) -> tuple[str, str, str]:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), str(value.device), str(tuple(value.shape)))
    return (type(value).__name__, "", "")


def check_structure(
    gm: fx.GraphModule, outputs: list[Any], known: set[fx.Node]
) -> None:
    """Raise PassError unless the graph is well formed and gives the same outputs.

    ``outputs`` is the `signature` of before: dtypes, devices and shapes have to agree.
    Nodes outside ``known`` are new: each must carry the value that its operator gives
    on fake tensors, with the same shape, dtype and strides.
    """
    gm.graph.lint()
    before, after = ([_describe(v) for v in x] for x in (outputs, signature(gm)))
    if after != before:
        raise PassError(f"the outputs changed from {before} to {after}")
    for node in gm.graph.nodes:
        if node not in known and node.op == "call_function":
            _check_value(node)


def check_collectives(gm: fx.GraphModule, before: int) -> None:
    """Raise PassError if ``gm`` has fewer collectives than the ``before`` it had.

    Without one of its sums a rank goes on with its own part: results are wrong without
    an error, or other ranks wait for ever. So this is checked whatever is switched off.
    """
    after = count_collectives(gm)
    if after < before:
        raise PassError(f"of {before} collectives {before - after} are gone")


def _check_value(node: fx.Node) -> None:
    expected = node.meta.get("example_value")
    if not isinstance(expected, torch.Tensor):
        return
    load = lambda n: n.meta["example_value"]  # noqa: E731
    args = fx.map_arg(node.args, load)
    kwargs = fx.map_arg(node.kwargs, load)
    mode = getattr(expected, "fake_mode", torch.no_grad())
    with _compat.discarding_sizes(mode), mode:
        actual = node.target(*args, **kwargs)  # type: ignore[operator]
    if _form(actual) != _form(expected):
        raise PassError(
            f"{node.name} claims {_describe(expected)}, strides {expected.stride()}, "
            f"but gives {_describe(actual)}, strides {actual.stride()}"
        )


def _form(value: torch.Tensor) -> str:
    """Return dtype, device, sizes and strides; a size that data gives has no name."""
    return _DATA_SIZE.sub("u", f"{_describe(value)} {value.stride()}")


def compare_first_call(
    original: fx.GraphModule,
    compiled: Callable[..., Any],
    report: Callable[[float, float], None],
) -> Callable[..., Any]:
    """Run the unrewritten graph beside the compiled one on the first call.

    ``report`` gets the largest absolute difference over the float outputs and the
    largest absolute value among them. Inputs are copied: graphs may write to them.
    """
    done = False

    def run(*args: Any) -> Any:
        nonlocal done
        if done:
            return compiled(*args)
        done = True
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        with torch.no_grad():
            expected = original(*copies)
        actual = compiled(*args)
        report(*_difference(expected, actual))
        return actual

    return run


def _difference(expected: Sequence[Any], actual: Sequence[Any]) -> tuple[float, float]:
    worst, scale = 0.0, 0.0
    for a, b in zip(expected, actual, strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel():
            difference = (a.double() - b.detach().double()).abs()
            same = (a == b) | (a.isnan() & b.isnan())
            # NaN on one side only is as far apart as can be; max() would lose it.
            difference = difference.masked_fill(same, 0.0).nan_to_num(nan=math.inf)
            worst = max(worst, difference.max().item())
            finite = a.double().abs().nan_to_num(0.0, 0.0, 0.0)
            scale = max(scale, finite.max().item())
    return worst, scale
