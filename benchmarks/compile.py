"""How long is a cold compile of SmolLM2 (30 layers), caches off, dynamic shapes?

Each side compiles in a fresh process with an empty cache, Inductor with its own
defaults; graphopt with the default pipeline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.harness import keep, wait_for_quiet

_PROGRAM = """
import json, sys, time
import torch
from graphopt.models import load
model = load("smollm2").model
ids = torch.randint(0, 1000, (1, 64))
with torch.no_grad():
    model(ids, use_cache=True, logits_to_keep=1)
    fast = torch.compile(model, backend=sys.argv[1], dynamic=True)
    start, cpu = time.perf_counter(), time.process_time()
    fast(ids, use_cache=True, logits_to_keep=1)
    print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def main(quick: bool = False) -> dict[str, Any]:
    """Compile once a side and round; the ratio is of the best of each."""
    rows: list[dict[str, Any]] = []
    for _ in range(1 if quick else 2):
        for backend in ("inductor", "graphopt"):
            wait_for_quiet()
            rows.append({"backend": backend, "seconds": _cold(backend)})
    best = {
        name: min(r["seconds"] for r in rows if r["backend"] == name)
        for name in ("inductor", "graphopt")
    }
    summary = {"ratio": round(best["graphopt"] / best["inductor"], 4)}
    return keep("compile", rows, summary, quick=quick)


def _cold(backend: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        command = [sys.executable, "-c", _PROGRAM, backend]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
    return round(float(json.loads(result.stdout.splitlines()[-1])["seconds"]), 2)


if __name__ == "__main__":
    print(main()["summary"])
