"""The chunked prefill of llm.npu's paper, as tasks for the simulator.

From the paper (Xu et al. 2025, sections 3.4 and 4): chunks of 256 tokens, prompts of
1,024, 18 layers (Gemma-2B), int8 linears on the NPU, norms and attention in float on
the CPU, and 37 % of the NPU's time in bubbles when chunks run in order. Of these follow
the times, for in order one chunk is a chain in which the NPU waits whenever the CPU
works: the CPU takes 0.37 and the NPU 0.63 of the sum.

Assumed, for the paper does not say: the four subgraphs of a layer are norm (CPU), QKV
(NPU), attention (CPU) and output projection with FFN (NPU); the NPU's time goes by the
weights of Gemma-2B; norms take ``norm_share`` of the CPU's time, a tenth; attention
goes by the keys that a chunk sees, half of its own and all before (``by_keys``), or
takes as long in every chunk. A layer takes a second on average: only ratios count.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from graphopt.runtime.schedule.dag import Dag, Group, chunk_dag, repeated
from graphopt.runtime.schedule.policies import IN_ORDER, POLICIES, Processor, stagger
from graphopt.runtime.schedule.simulator import Timeline, simulate

LAYERS, CHUNKS = 18, 4
CPU_SHARE, NORM_SHARE = 0.37, 0.1
_WIDTH, _HEADS, _NEURONS = 2048, 2048 + 2 * 256, 16384  # Gemma-2B: 8 heads, 1 of KV
_QKV = _WIDTH * _HEADS
_REST = _WIDTH * _WIDTH + 3 * _WIDTH * _NEURONS

NPU, CPU = Processor("NPU", int8=True), Processor("CPU")
SIDES = {**POLICIES, "stagger by 1": partial(stagger, shift=1)}
SUBGRAPHS = (
    Group(0, "norm", processor="CPU"),
    Group(0, "qkv", processor="NPU"),
    Group(0, "attention", dynamic=True, processor="CPU"),
    Group(0, "ffn", processor="NPU"),
)


def paper_dag(
    chunks: int = CHUNKS, by_keys: bool = True, norm_share: float = NORM_SHARE
) -> Dag:
    """Return the tasks of a prompt of ``chunks`` chunks."""
    npu = 1 - CPU_SHARE
    keys = [chunk + 0.5 if by_keys else 1.0 for chunk in range(chunks)]
    mean = sum(keys) / chunks

    def duration(chunk: int, position: int) -> float:
        return (
            CPU_SHARE * norm_share,
            npu * _QKV / (_QKV + _REST),
            CPU_SHARE * (1 - norm_share) * keys[chunk] / mean,
            npu * _REST / (_QKV + _REST),
        )[position % len(SUBGRAPHS)]

    return chunk_dag(repeated(SUBGRAPHS, LAYERS), chunks, duration)


def timeline(
    policy: str, chunks: int, by_keys: bool = True, norms: float = NORM_SHARE
) -> Timeline:
    """Run the paper's tasks by a policy of `SIDES`."""
    return simulate(paper_dag(chunks, by_keys, norms), (NPU, CPU), SIDES[policy])


def simulated(chunks: int, norms: float) -> list[dict[str, Any]]:
    """Return a row for each policy: how long the NPU idles, how much is gained."""
    base = timeline(IN_ORDER, chunks, True, norms).makespan
    rows = []
    for policy in SIDES:
        own, even = (timeline(policy, chunks, by, norms) for by in (True, False))
        rows.append(
            {
                "case": "paper",
                "policy": policy,
                "chunks": chunks,
                "norm_share": norms,
                "npu_bubble": round(own.bubble_rate(NPU.name), 4),
                "npu_bubble_even": round(even.bubble_rate(NPU.name), 4),
                "makespan_ratio": round(own.makespan / base, 4),
            }
        )
    return rows
