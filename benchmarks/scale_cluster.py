"""Llama-3-70B on a cluster of H100s, as a cost that the serving simulator takes.

Nothing here is measured: the seconds of a step are those of a roofline with the
published rates below, of which a share is assumed to be reached. `fit_cost` then gives
the four weights of `StepCost`; `Fitted.error` says how far these are from the roofline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graphopt.runtime.engine.simulator import Load, StepCost, fit_cost

TILE = 128  # tokens: a matrix product takes as long for 129 rows as for 256
_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder with gated FFNs; by default those of Llama-3-70B."""

    layers: int = 80
    hidden: int = 8192
    intermediate: int = 28672
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256

    @property
    def weights(self) -> int:
        """Return the parameters of all linears, the head among them."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.hidden * self.vocabulary

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of a token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _BYTES


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines: an H100 SXM, eight to a node (NVIDIA's data).

    FLOP/s of dense bfloat16, bytes/s of HBM, of NVLink and of InfiniBand (NDR, 400
    Gbit/s a GPU), each in one direction; the share of each that is reached; seconds of
    latency of an all-reduce within a node and of a message between nodes, and of
    launching a layer; bytes of HBM that weights, keys and values may take.
    """

    flops: float = 989e12
    hbm: float = 3.35e12
    nvlink: float = 450e9
    infiniband: float = 50e9
    compute_reached: float = 0.6
    memory_reached: float = 0.8
    links_reached: float = 0.8
    all_reduce_latency: float = 8e-6
    message_latency: float = 10e-6
    layer_overhead: float = 10e-6
    memory: float = 72e9


@dataclass(frozen=True)
class Split:
    """``tp`` GPUs of a node share out each layer; ``pp`` nodes are stages."""

    tp: int
    pp: int

    @property
    def gpus(self) -> int:
        """Return how many GPUs there are."""
        return self.tp * self.pp


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step, those of all stages together."""

    model: Model
    cluster: Cluster
    split: Split

    def seconds(self, loads: Iterable[Load]) -> float:
        """Return linears, attention, collectives and messages of a step, added up."""
        loads = list(loads)
        tokens = -(-sum(load.new for load in loads) // TILE) * TILE
        return (
            self._linears(tokens)
            + sum(map(self._attention, loads))
            + self._exchanged(tokens)
            + self.model.layers * self.cluster.layer_overhead
        )

    def _linears(self, tokens: int) -> float:
        """Return the longer of computing and of reading the weights."""
        compute = 2 * self.model.weights * tokens / self._flops
        return max(compute, _BYTES * self.model.weights / self._hbm)

    def _attention(self, load: Load) -> float:
        if load.new == 1:
            return load.past * self.model.kv_bytes / self._hbm
        pairs = load.past * load.new + load.new**2 / 2
        width = self.model.layers * self.model.heads * self.model.head_dim
        return 4 * width * pairs / self._flops

    def _exchanged(self, tokens: int) -> float:
        """Two all-reduces a layer within a node (a ring), a message between stages."""
        cluster, tp = self.cluster, self.split.tp
        sent = tokens * self.model.hidden * _BYTES
        ring = 2 * (tp - 1) / tp * sent / (cluster.nvlink * cluster.links_reached)
        reduced = (ring + cluster.all_reduce_latency) if tp > 1 else 0.0
        # Each GPU of a stage sends its part, which the next node gathers.
        message = sent / tp / (cluster.infiniband * cluster.links_reached)
        hops = self.split.pp - 1
        return 2 * self.model.layers * reduced + hops * (
            message + cluster.message_latency
        )

    @property
    def _flops(self) -> float:
        return self.split.tp * self.cluster.flops * self.cluster.compute_reached

    @property
    def _hbm(self) -> float:
        return self.split.tp * self.cluster.hbm * self.cluster.memory_reached

    def pages(self, page: int) -> int:
        """Return how many pages of keys and values fit beside the weights."""
        room = self.cluster.memory * self.split.gpus - _BYTES * self.model.weights
        return int(room // (self.model.kv_bytes * page))


@dataclass(frozen=True)
class Fitted:
    """The cost that fits a roofline, and its largest relative error on those steps."""

    cost: StepCost
    error: float


def fitted(roofline: Roofline) -> Fitted:
    """Fit the simulator's cost to steps of decodes, of prompts, and of both."""
    steps = [(loads, roofline.seconds(loads)) for loads in _steps()]
    cost = fit_cost(steps, TILE)
    return Fitted(cost, max(map(abs, cost.errors(steps))))


def _steps() -> Sequence[Sequence[Load]]:
    decodes = [
        [Load(past, 1)] * rows for past in (512, 1536, 3072) for rows in (8, 32, 96)
    ]
    prompts = [[Load(0, new)] for new in (256, 512, 1024, 2048, 3500)]
    chunks = [
        [Load(past, chunk - 32), *decodes[1][:1] * 32]
        for past in (0, 1024, 2048)
        for chunk in (256, 512, 1024)
    ]
    return [*decodes, *prompts, *chunks]


def assumptions(model: Model, cluster: Cluster) -> dict[str, Any]:
    """Return everything that the simulated figures rest on."""
    return {"model": asdict(model), "cluster": asdict(cluster), "tile": TILE}
