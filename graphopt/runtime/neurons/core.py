"""The neurons of all layers of a cache, and what each call does with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ConfigError
from graphopt.ops.neurons import kept_neurons
from graphopt.passes.ffn.options import middle_layers
from graphopt.runtime.neurons.buffers import NeuronBuffers, numbers
from graphopt.runtime.neurons.shapes import FfnShape, find_ffn_shapes
from graphopt.runtime.rows import Rows

# The prompt's length is kept as the size of an empty tensor, as in `Rows`. Other sizes
# are not so great: equal ones would become one symbol of a graph.
_OFFSET = 1 << 20


class CoreNeurons:
    """CoreInfer's state (Wang et al. 2024) of the requests in one cache.

    A prompt, and every later call of several tokens, runs densely and is counted. A
    decoding step runs on the neurons that were chosen then; on all where the prompt,
    the longest of a batch, had fewer than ``min_tokens``. These steps are graphs of
    their own, which Dynamo tells apart by sizes: what is dense is not touched at all.
    ``refresh``: every so many tokens a step is dense and counted for as many; 0: never.
    ``each``: rows of a batch have neurons of their own.
    """

    def __init__(
        self,
        layers: Mapping[int, NeuronBuffers],
        each: bool = False,
        min_tokens: int = 200,
        refresh: int = 0,
    ) -> None:
        self.layers, self.each = dict(layers), each
        self._rule = f"{min_tokens},{refresh}"  # text, as in `NeuronBuffers`
        self._prompt: Tensor | None = None
        self._phase = ""
        if not each:
            for buffers in self.layers.values():
                buffers.make(1)
            for tensor in self.tensors():
                # A CUDA graph reads them where they are.
                torch._dynamo.mark_static_address(tensor, guard=False)

    @classmethod
    def of(cls, model: Any, rule: Mapping[str, Any]) -> CoreNeurons | None:
        """Make what `neuron-mask` with the options ``rule`` needs for ``model``.

        None where every neuron is kept. Raises ConfigError where a layer that the
        options name has no FFN.
        """
        shapes = find_ffn_shapes(model)
        clusters = _clusters(rule["clusters"], rule["counted"])
        layers = {}
        for index, shape in _wanted(model, shapes, rule["layers"]):
            kept = kept_neurons(shape.neurons, rule["keep"])
            if kept < shape.neurons or rule["force"]:
                shares = _shares(clusters, index, shape)
                coded = rule["buffers"] == "int8"
                layers[index] = NeuronBuffers(shape, kept, shares, coded)
        rest = {name: rule[name] for name in ("each", "min_tokens", "refresh")}
        return cls(layers, **rest) if layers else None

    def begin(self, rows: Rows, new: int) -> None:
        """Decide what a call of ``new`` tokens does, which ``rows`` has counted."""
        assert rows.table is not None and rows.mark is not None
        for buffers in self.layers.values():
            if buffers.indices is None:
                buffers.make(rows.table.shape[0])
        if rows.past_tokens == 0:
            self._phase = "new"
        elif new > 1:
            self._phase = "more"
        else:
            self._phase = self._step(rows.tokens)
        if self._phase in ("new", "more"):
            sizes = (rows.tokens + _OFFSET, 0)
            self._prompt = torch.empty(sizes, device=rows.mark.device)

    def _step(self, tokens: int) -> str:
        """Return what a decoding step does behind which there are ``tokens``."""
        least, refresh = numbers(self._rule)
        prompt = 0 if self._prompt is None else self._prompt.shape[0] - _OFFSET
        if prompt < least:
            return ""
        if refresh and (tokens - prompt) % refresh == 0:
            return "refresh"
        return "use"

    def hold(self, layer: int) -> None:
        """Say in ``layer`` what the running call does with its neurons."""
        buffers = self.layers.get(layer)
        if buffers is not None and self._phase:
            weight = numbers(self._rule)[1] if self._phase == "refresh" else 1
            buffers.hold(self._phase, weight)

    def tensors(self) -> list[Tensor]:
        """Return everything that is kept."""
        return [t for buffers in self.layers.values() for t in buffers.tensors()]

    def select(self, source: Tensor) -> None:
        """Let row b go on as row ``source[b]`` [B'] was."""
        for buffers in self.layers.values():
            if self.each and buffers.indices is not None:
                buffers.select(source)

    def forget(self) -> None:
        """Forget what was chosen; the buffers stay where they are."""
        for buffers in self.layers.values():
            buffers.forget()


def _wanted(
    model: Any, shapes: list[FfnShape | None], named: list[int] | None
) -> list[tuple[int, FfnShape]]:
    """Return the layers whose neurons are masked; by default those that can be."""
    found = []
    for index in middle_layers(len(shapes)) if named is None else named:
        shape = shapes[index] if index < len(shapes) else None
        if shape is not None:
            found.append((index, shape))
        elif named is not None:
            raise ConfigError(
                f"neuron-mask: layer {index} has no feed-forward network to mask; "
                f"{type(model).__name__} has {len(shapes)} layers"
            )
    return found


def _clusters(
    path: str | None, counted: Mapping[str, Any]
) -> Mapping[int, Tensor] | None:
    if path is None:
        return None
    from graphopt.runtime.neurons.clusters import read_clusters

    found = read_clusters(path)
    for name, value in counted.items():
        if (other := found.about.get(name, value)) != value:
            raise ConfigError(
                f"{path}: its texts were counted with {name} = {other!r}, and the "
                f"config has {value!r}; make both the same"
            )
    return found.shares


def _shares(
    clusters: Mapping[int, Tensor] | None, layer: int, shape: FfnShape
) -> Tensor | None:
    if clusters is None:
        return None
    shares = clusters.get(layer)
    if shares is None or shares.shape[1] != shape.neurons:
        found = "none" if shares is None else f"{shares.shape[1]} neurons"
        raise ConfigError(
            f"neuron-mask: the clusters have {found} for layer {layer}, which has "
            f"{shape.neurons} neurons; make them for this model: `graphopt cluster`"
        )
    return shares.to(shape.device)
