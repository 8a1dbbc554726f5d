"""Prefill of a model with Llama-3-8B's layers, and how long a cold compile takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.device.attention import DIM, HEADS, KV_HEADS, SINK, WINDOW
from benchmarks.device.timing import DEVICE, Row, compare, row

A_SHAPE = f"sparse-attention{{pattern=a-shape,sink={SINK},window={WINDOW}}}"
SIZES = {
    "hidden_size": HEADS * DIM,
    "intermediate_size": 14336,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}


def llama(layers: int) -> Any:
    """Return ``layers`` of Llama-3-8B with random weights, on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SIZES, num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def prefill_rows(
    layers: int, lengths: tuple[int, ...], notes: list[str]
) -> Iterator[Row]:
    model = llama(layers)
    options = {"config": A_SHAPE}
    torch._dynamo.reset()
    models: dict[str, Callable[..., Any]] = {
        "graphopt": torch.compile(
            model, backend="graphopt", dynamic=True, options=options
        ),
        "inductor": torch.compile(model, dynamic=True),
        "cudnn": torch.compile(_with_cudnn(model), dynamic=True),
    }
    for tokens in lengths:
        ids = torch.randint(0, SIZES["vocab_size"], (1, tokens), device=DEVICE)
        sides = {name: partial(_prefill, m, ids) for name, m in models.items()}
        found = compare(sides, f"prefill at {tokens} tokens", notes)
        yield row("prefill", "a-shape", tokens, found)
    torch._dynamo.reset()


def _with_cudnn(model: Any) -> Callable[..., Any]:
    """A function of its own, so that Dynamo does not take it for the plain model."""

    def forward(ids: torch.Tensor, **arguments: Any) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return model(ids, **arguments)

    return forward


@torch.no_grad()
def _prefill(model: Callable[..., Any], ids: torch.Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


_PROGRAM = """
import sys, time, torch
from benchmarks.device.prefill import DEVICE, llama
model = llama(int(sys.argv[2]))
ids = torch.randint(0, 1000, (1, 64), device=DEVICE)
with torch.no_grad():
    model(ids, use_cache=True, logits_to_keep=1)
    fast = torch.compile(model, backend=sys.argv[1], dynamic=True)
    start = time.perf_counter()
    fast(ids, use_cache=True, logits_to_keep=1).logits.cpu()
    print(1000 * (time.perf_counter() - start))
"""


def compile_row(layers: int, notes: list[str]) -> Row:
    found: dict[str, float | None] = {}
    for backend in ("inductor", "graphopt"):
        try:
            found[backend] = _cold(backend, layers)
        except (subprocess.SubprocessError, ValueError) as error:
            found[backend] = None
            failed = isinstance(error, subprocess.CalledProcessError)
            said = (error.stderr if failed else str(error)).strip() or str(error)
            notes.append(f"compile, {backend}: {said.splitlines()[-1][-200:]}")
    return row("compile", "default", 64, found)


def _cold(backend: str, layers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "GRAPHOPT_CACHE_DIR": f"{folder}/graphopt",
        }
        command = [sys.executable, "-c", _PROGRAM, backend, str(layers)]
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
    return float(done.stdout.splitlines()[-1])
