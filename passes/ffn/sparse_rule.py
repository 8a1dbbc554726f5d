"""Which linears of a decoding step skip weights, and what counts as small there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from graphopt.calibration.levels import Levels
from graphopt.codegen.cpp.sparse_linear import MOST_ROWS
from graphopt.errors import ConfigError
from graphopt.ir.constants import is_parameter, parameter_name
from graphopt.ir.match import value_of
from graphopt.ir.sites.linear import LinearSite

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Bytes a second at which dense products read weights, and seconds that a call of a
# sparse one takes beside reading (benchmarks/sparse_linear.py).
_RATE = {"cpu": 25e9, "cuda": 2.5e12}
_CHANGES = ("changes", "the weight is computed, so nothing is known of its input")
_CALL = {"cpu": 10e-6, "cuda": 6e-6}


class Calibrated(Protocol):
    """What is known of a model's activations; `graphopt.calibration.Calibration`."""

    def threshold(self, kind: str, name: str, sparsity: float) -> float:
        """Return the magnitude that the share ``sparsity`` of values do not exceed."""
        ...


def read_levels(path: str, sparsity: float) -> Levels:
    """Read levels; ConfigError where they were made for another sparsity."""
    levels = Levels.read(path)
    if levels.sparsity != sparsity:
        raise ConfigError(
            f"{path}: its levels leave out {levels.sparsity} and the config says "
            f"{sparsity}; write sparsity = {levels.sparsity}, or make other levels"
        )
    return levels


@dataclass(frozen=True)
class Rule:
    """Which sites are rewritten, and with which thresholds.

    ``mixed``: one graph serves prompts and steps, so that its rows are any number, and
    each call tells whether they are few enough for weights to be skipped.
    """

    sparsity: float
    force: bool
    device: str
    calibrated: Calibrated
    levels: Levels | None = None
    mixed: bool = False

    def refusal(self, linears: Sequence[LinearSite]) -> tuple[str, str] | None:
        """Return a code and a reason why ``linears`` stay dense; None: they do not.

        Of the last one a second copy is made, once, so its weight must be a parameter.
        """
        for site in linears:
            if reason := _unfit(site, self.mixed):
                return reason
            if not self._of(site):
                return "dense", "the levels leave nothing of its inputs out"
        if not is_parameter(linears[-1].weight):
            return _CHANGES
        return None if self.force else self._slower(linears)

    def threshold(self, kind: str, linear: LinearSite) -> float:
        """Return what is small for a linear's input, or for its FFN's gate."""
        name = parameter_name(linear.weight)
        return self.calibrated.threshold(kind, name, self._of(linear))

    def _of(self, linear: LinearSite) -> float:
        """Return what is left out of a linear's inputs; none without a level."""
        if self.levels is None:
            return self.sparsity
        return self.levels.of(parameter_name(linear.weight)) or 0.0

    def _slower(self, linears: Sequence[LinearSite]) -> tuple[str, str] | None:
        """A column is read if any row keeps it; rows keep them by chance."""
        rows = 1 if self.mixed else linears[0].rows
        read = 1 - self._of(linears[0]) ** rows
        size = sum(value_of(x.weight).nbytes for x in linears)
        rate, call = _RATE.get(self.device, 0.0), _CALL.get(self.device, 0.0)
        if size * (1 - read) > rate * call * len(linears):
            return None
        return "slower", f"{read:.0%} of {size / 1e6:.2g} MB would be read"


def _unfit(site: LinearSite, mixed: bool) -> tuple[str, str] | None:
    if site.done:
        return "done", "another pass has rewritten the linear"
    if reason := site.unsupported():
        return "unsupported", reason
    if (dtype := value_of(site.weight).dtype) not in _DTYPES:
        return "unsupported", f"there is no kernel for {dtype}"
    if not parameter_name(site.weight):
        return _CHANGES
    rows = site.rows
    if not mixed and (not isinstance(rows, int) or rows > MOST_ROWS):
        return "many-rows", f"{rows} rows share the weights; at most {MOST_ROWS} may"
    return None
