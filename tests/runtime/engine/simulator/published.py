"""What SARATHI (arXiv 2308.16369) measured of LLaMA-13B on an A6000, as steps.

Section 4.4 and figure 4: prompts of 128, 256 and 257 tokens take 55, 69.8 and 92.3 ms;
chunks of 256 run at 87.5% of the peak rate, reached at 512; a batch of four decodes
takes 12.49 ms a token. Attention's part follows from reading 0.8 MB of keys and values
a token at 768 GB/s, and from 0.8 MFLOP a pair of tokens at 50 TFLOP/s.
"""

from __future__ import annotations

from graphopt.runtime.engine.simulator import Load, StepCost, fit_cost

TILE = 128
_READ = 1.07e-6  # seconds a token of context and decode
_PAIR = 0.8e-8  # seconds half a pair of tokens
_PEAK = 0.875 * 256 / 0.0698  # tokens a second below peak at 256
_PROMPTS = {128: 0.055, 256: 0.0698, 257: 0.09233} | {
    n: n / (_PEAK / 0.875**2) for n in (512, 768, 1024)
}


def published_steps() -> list[tuple[list[Load], float]]:
    """Return loads and seconds."""
    prompts = [
        ([Load(0, n)], seconds + _PAIR * n**2) for n, seconds in _PROMPTS.items()
    ]
    decodes = [
        ([Load(past, 1)] * 4, 4 * 0.01249 + _READ * 4 * (past - 1024))
        for past in (512, 1024, 2048)
    ]
    late = [([Load(1024, 256)], 0.0698 + _PAIR * (2 * 1024 * 256 + 256**2))]
    return prompts + decodes + late


def llama_13b() -> StepCost:
    """Return the cost that fits them best."""
    return fit_cost(published_steps(), TILE)
