"""The neurons of one layer that decoding computes, and their weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.errors import ConfigError
from graphopt.runtime.neurons.shapes import FfnShape

# What `graphopt::hold_neurons` takes first, in its order, and last.
_NAMES = ("counts", "indices", "up", "down", "gate", "up_bias", "gate_bias", "shares")
_SCALES = ("up_scales", "down_scales", "gate_scales")


class NeuronBuffers:
    """The counts, the choice and the gathered weights of one layer.

    ``counts`` int32 [R, F]; ``indices`` int64 [R, C]; ``up``, ``gate`` [R, C, D] (a
    fused projection is ``up``, [R, 2 C, D]), ``down`` [R, D, C], biases [R, C]; the
    axis R of the weights is left out where it is 1. ``shares`` [K, F]: clusters.
    Where ranks share the neurons out, counts, choice and clusters are of all F on every
    rank, and the weights have room for as many of the C as a rank can have.
    ``coded``: the weights are int8 codes and lie as [outputs, inputs], with a scale
    each output, float32 [R, outputs]: ``up_scales``, ``gate_scales``, ``down_scales``.
    """

    def __init__(
        self,
        shape: FfnShape,
        kept: int,
        shares: Tensor | None,
        coded: bool = False,
    ) -> None:
        self.shares = shares
        self.device = shape.device
        # As text: Dynamo would make symbols of numbers, and no size would be known.
        self._rows = f"{shape.neurons},{kept}"
        self._weights = tuple(
            (name, ",".join(map(str, sizes)), dtype)
            for name, sizes, dtype in _all(shape, min(kept, shape.own), coded)
        )
        self.counts: Tensor | None = None
        self.indices: Tensor | None = None
        self.up: Tensor | None = None
        self.down: Tensor | None = None
        self.gate: Tensor | None = None
        self.up_bias: Tensor | None = None
        self.gate_bias: Tensor | None = None
        self.up_scales: Tensor | None = None
        self.down_scales: Tensor | None = None
        self.gate_scales: Tensor | None = None

    def make(self, rows: int) -> None:
        """Give ``rows`` choices room; nothing is chosen."""
        neurons, kept = numbers(self._rows)
        device = self.device
        self.counts = torch.zeros((rows, neurons), dtype=torch.int32, device=device)
        self.indices = torch.full((rows, kept), -1, dtype=torch.int64, device=device)
        for name, text, dtype in self._weights:
            sizes = _whole(rows, numbers(text))
            setattr(self, name, torch.empty(sizes, dtype=dtype, device=device))

    def hold(self, phase: str, weight: int) -> None:
        """Say what a call does with the neurons.

        In a compiled graph this is where `neuron-mask` finds the tensors.
        """
        self._check()
        given = [getattr(self, name) for name in _NAMES]
        scales = [] if self.up_scales is None else [getattr(self, n) for n in _SCALES]
        torch.ops.graphopt.hold_neurons(*given, phase, weight, *scales)

    def _check(self) -> None:
        """Tie the sizes to the numbers that they are; in a graph they are symbols."""
        assert self.counts is not None and self.indices is not None
        neurons, kept = numbers(self._rows)
        rows = self.indices.shape[0]
        fits = self.counts.shape == (rows, neurons) and self.indices.shape[1] == kept
        for name, text, _ in self._weights:
            sizes = _whole(rows, numbers(text))
            fits = fits and getattr(self, name).shape == tuple(sizes)
        if self.shares is not None:
            fits = fits and self.shares.shape[1] == neurons
        if not fits:
            raise ConfigError("Cache: buffers of neurons were changed from outside")

    def select(self, source: Tensor) -> None:
        """Let row b go on as row ``source[b]`` [B'] was; copies only what differs."""
        assert self.counts is not None and self.indices is not None
        before, chosen = self.indices, self.indices[source]
        if torch.equal(chosen, before) and torch.equal(
            self.counts, self.counts[source]
        ):
            return
        self.indices, self.counts = chosen, self.counts[source]
        for name, text, _ in self._weights if not torch.equal(chosen, before) else ():
            rows = getattr(self, name)
            rows = rows[None] if len(before) == 1 else rows
            sizes = _whole(len(source), numbers(text))
            setattr(self, name, rows[source].reshape(sizes))

    def forget(self) -> None:
        """Choose anew for another text."""
        if self.indices is not None:
            self.indices.fill_(-1)

    def tensors(self) -> list[Tensor]:
        """Return what is kept of a text."""
        names = ("counts", "indices", *(name for name, _, _ in self._weights))
        found = (getattr(self, name) for name in names)
        return [tensor for tensor in found if tensor is not None]


def numbers(text: str) -> list[int]:
    """Return the whole numbers of "2,3"."""
    return [int(number) for number in text.split(",")]


def _whole(rows: int, sizes: list[int]) -> list[int]:
    return sizes if rows == 1 else [rows, *sizes]


_Sized = tuple[str, tuple[int, ...], torch.dtype]


def _all(shape: FfnShape, kept: int, coded: bool) -> Iterator[_Sized]:
    """Yield the tensors that there are, their sizes without R and types."""
    width = kept * (2 if shape.fused else 1)
    for name, *sizes in _matrices(shape, kept, width):
        if coded:
            yield name, (*sizes,), torch.int8
            yield f"{name}_scales", (sizes[0],), torch.float32
        else:
            yield name, (*(sizes[::-1] if shape.transposed else sizes),), shape.dtype
    if shape.up_bias:
        yield "up_bias", (width,), shape.dtype
    if shape.gate_bias:
        yield "gate_bias", (kept,), shape.dtype


def _matrices(shape: FfnShape, kept: int, width: int) -> Iterator[tuple[str, int, int]]:
    """Yield the weights' names, outputs and inputs."""
    yield "up", width, shape.hidden_size
    yield "down", shape.hidden_size, kept
    if shape.gated:
        yield "gate", kept, shape.hidden_size
