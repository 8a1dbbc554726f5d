"""The sides of the vision-drop benchmark, and how many vision tokens they keep."""

from __future__ import annotations

import math

DENSE, LOSSLESS, MUST, TUNED = "dense", "structured-mask", "must", "must, tuned"
THRESHOLD, PRESET = "must, threshold", "must, preset"

# FastV's K = 2. Behind layer 0 this model's attention does not tell yet where to look,
# and behind layer 3 little of the image is still read (examples/tiny_vlm/README.md).
LAYER = 1
SHARES = (1 / 2, 1 / 3, 2 / 9, 1 / 9)


def config(method: str, share: float, options: str = "") -> str:
    """Return a config that leaves ``share`` of the vision tokens behind `LAYER`."""
    point = f"schedule=[{{layer={LAYER},keep={share:.6f}}}]"
    drop = f"token-drop{{method={method},tokens=vision,{options}{point}}}"
    return f"{LOSSLESS},{drop}"


def count(tokens: int, share: float) -> int:
    """Return how many of ``tokens`` the passes keep of a share."""
    return math.ceil(tokens * share - 1e-9)
