"""llama.cpp in a process of its own: requests on stdin, answers on stdout, JSON lines.

Run by an interpreter that has llama_cpp and need have nothing else:

    python -I llama_cpp_worker.py MODEL.gguf CONTEXT THREADS

``-I`` keeps this folder, whose llama_cpp.py is the benchmark, off the import path. The
first line out is about the build. A request names what to do, a side ("FA off" or
"FA on": flash attention) and token ids: ``prefill`` forgets all and reads the tokens;
``decode`` reads them one by one and forgets them; ``logits`` does the same and writes
each step's logits (float32, [tokens, vocab]) to ``path``. Tokens come as ids, so that
the other side of a comparison reads the same ones. A mistake is answered with
``error``; the worker ends with its input.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

SIDES = {"FA off": False, "FA on": True}
BATCH = 2048  # tokens handed over at once; llama.cpp computes 512 of them at a time


class Reader(Protocol):
    """A context that reads tokens."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Forget all and read ``tokens``."""

    def decode(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Read ``tokens`` one by one, yielding float32 logits; then forget them."""


class LlamaContext:
    """A llama.cpp context by its C interface, without a Python layer's overhead."""

    def __init__(self, model: Any, room: int, threads: int, flash: bool) -> None:
        import llama_cpp

        self.api = llama_cpp
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = room, BATCH
        options.n_threads = options.n_threads_batch = threads
        kind = "ENABLED" if flash else "DISABLED"
        options.flash_attn_type = getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
        self.context = llama_cpp.llama_init_from_model(model, options)
        if not self.context:
            raise ValueError(f"no llama.cpp context of {room} tokens (out of memory?)")
        self.memory = llama_cpp.llama_get_memory(self.context)
        vocab = llama_cpp.llama_model_get_vocab(model)
        self.logits_bytes = 4 * llama_cpp.llama_vocab_n_tokens(vocab)
        self.length = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Forget all and read ``tokens``; logits are computed for the last alone."""
        self._forget(0)
        for start in range(0, len(tokens), BATCH):
            self._read(tokens[start : start + BATCH])

    def decode(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Read ``tokens`` one by one, yielding float32 logits; then forget them."""
        before = self.length
        for token in tokens:
            self._read([token])
            logits = self.api.llama_get_logits_ith(self.context, -1)
            yield ctypes.string_at(logits, self.logits_bytes)
        self._forget(before)

    def _read(self, tokens: Sequence[int]) -> None:
        ids = (self.api.llama_token * len(tokens))(*tokens)
        batch = self.api.llama_batch_get_one(ids, len(tokens))
        if code := self.api.llama_decode(self.context, batch):
            raise ValueError(f"llama_decode of {len(tokens)} tokens failed: {code}")
        self.api.llama_synchronize(self.context)
        self.length += len(tokens)

    def _forget(self, length: int) -> None:
        if not self.api.llama_memory_seq_rm(self.memory, 0, length, -1):
            raise ValueError(f"llama.cpp cannot forget tokens behind {length}")
        self.length = length


def answer(request: Mapping[str, Any], sides: Mapping[str, Reader]) -> dict[str, Any]:
    """Do one request; the answer has wall and CPU seconds and the peak memory (MB)."""
    side, tokens = sides[request["side"]], request["tokens"]
    wall, cpu = time.perf_counter(), time.process_time()
    if request["do"] == "prefill":
        side.prefill(tokens)
    elif request["do"] == "decode":
        for _ in side.decode(tokens):
            pass
    elif request["do"] == "logits":
        Path(request["path"]).write_bytes(b"".join(side.decode(tokens)))
    else:
        raise ValueError(f"unknown request {request['do']!r}")
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1e6 if sys.platform == "darwin" else 1e6 / 1024),
    }


def serve(
    lines: Iterator[str], sides: Mapping[str, Reader], say: Callable[[Any], None]
) -> None:
    """Answer every line; a mistake is an answer too."""
    for line in lines:
        try:
            say(answer(json.loads(line), sides))
        except (ValueError, KeyError, OSError) as error:
            say({"error": f"{type(error).__name__}: {error}"})


def _start(gguf: str, room: int, threads: int) -> None:
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        gguf.encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"llama.cpp cannot load {gguf}")
    sides = {
        name: LlamaContext(model, room, threads, flash) for name, flash in SIDES.items()
    }
    features = llama_cpp.llama_print_system_info().decode()
    about = {"version": llama_cpp.__version__, "system": features}
    print(json.dumps(about), file=answers)
    serve(iter(sys.stdin), sides, lambda a: print(json.dumps(a), file=answers))


if __name__ == "__main__":
    _start(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
