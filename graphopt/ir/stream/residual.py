"""The residual stream: where each layer reads it, adds to it and hands it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import fx

from graphopt.ir.match import shape_of
from graphopt.ir.sites.linear import is_linear
from graphopt.ir.stream.scan import Group, ResidualAdd, scan_streams
from graphopt.ir.stream.trunk import SELECTING, Trunk, width


@dataclass(frozen=True)
class LayerStream:
    """A layer's part of the stream: ``input`` and ``output`` [B, S, H], its adds.

    ``input`` and what the layer computes from it reach later layers by ``output``, keys
    and values apart. ``output`` is the next layer's ``input`` unless tokens are
    selected in between.
    """

    input: fx.Node
    output: fx.Node
    adds: tuple[ResidualAdd, ...]

    @property
    def attention(self) -> tuple[int, ...]:
        """Return the indices of its attention sites; none for one not raised."""
        return tuple(index for add in self.adds for index in add.attention)


@dataclass(frozen=True)
class ResidualStream:
    """The stream of one stack of layers, from the first layer with attention on.

    A layer whose input and output are not single values is left out of ``layers``.
    """

    input: fx.Node
    output: fx.Node
    adds: tuple[ResidualAdd, ...]
    layers: tuple[LayerStream, ...]


def find_residual(
    trunk: Trunk, attention: Mapping[fx.Node, int | None]
) -> list[ResidualStream]:
    """Return the residual streams of a graph: one a stack (encoder, decoder, tower).

    ``attention`` are the nodes of attention and their sites' indices; None where none
    was raised, so that a softmax stands for it.
    """
    streams = [_cut(groups, trunk) for groups in scan_streams(trunk, attention)]
    for place, (before, after) in enumerate(pairwise(streams)):
        if _continues(before, after, trunk):
            kept = [x for x in before.layers if x.output is not before.output]
            streams[place] = replace(before, layers=tuple(kept))
            kept = [x for x in after.layers if x.input is not after.input]
            streams[place + 1] = replace(after, layers=tuple(kept))
    return streams


def _cut(groups: list[Group], trunk: Trunk) -> ResidualStream:
    """Cut a stream into layers where attention reads it."""
    starts = [i for i, group in enumerate(groups) if group.attends]
    end = _end(groups, starts[-1], trunk)
    layers = []
    for start, stop in zip(starts, [*starts[1:], None], strict=True):
        output = end if stop is None else _before_selection(groups[stop].path, trunk)
        part = LayerStream(groups[start].read, output, _adds(groups[start:stop]))
        layers += [] if _leaks(part, trunk) else [part]
    return ResidualStream(groups[0].read, end, _adds(groups), tuple(layers))


def _adds(groups: list[Group]) -> tuple[ResidualAdd, ...]:
    return tuple(add for group in groups for add in group.adds)


def _before_selection(path: list[fx.Node], trunk: Trunk) -> fx.Node:
    """Return the last value that still holds every token."""
    for before, node in pairwise(path):
        if trunk.kind(node) in SELECTING:
            return before
    return path[-1]


def _end(groups: list[Group], last: int, trunk: Trunk) -> fx.Node:
    """Return what leaves the last layer.

    No attention reads it, so that a norm after the last add may be the layer's own
    (post-norm) or the model's final one: the layer ends as the one before it did.
    """
    example = groups[last].path if last else groups[-1].path
    node = groups[-1].adds[-1].node
    for step in example[1:]:
        kind = trunk.kind(step)
        following = None if kind in SELECTING else trunk.next(node, kind)
        if following is None:
            break
        node = following
    return node


def _leaks(part: LayerStream, trunk: Trunk) -> bool:
    """Tell whether a hidden state that is not the output is used after the layer."""
    start, end = trunk.order[part.input], trunk.order[part.output]
    channels, inside = width(part.input), {part.input}
    for node in trunk.nodes[start:end]:
        if node is not part.input and inside.isdisjoint(node.all_input_nodes):
            continue
        inside.add(node)
        if width(node) == channels and len(shape_of(node) or ()) > 1:
            later = [user for user in node.users if trunk.order[user] > end]
            if any(shape_of(user) is not None for user in later):
                return True
    return False


def _continues(before: ResidualStream, after: ResidualStream, trunk: Trunk) -> bool:
    """Tell whether ``after`` goes on where ``before`` was lost sight of.

    Streams that belong together only through a linear are two, such as a vision tower
    and the decoder that reads its projected patches.
    """
    floor = trunk.order[before.output]
    between = trunk.nodes[floor : trunk.order[after.input]]
    linears = {node for node in between if is_linear(node)}
    return before.output in trunk.ancestors(after.input, floor, linears)
