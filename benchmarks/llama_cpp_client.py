"""The benchmark's end of llama_cpp_worker.py: one process, asked turn by turn."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Seconds
from graphopt.errors import GraphoptError

WORKER = Path(__file__).with_name("llama_cpp_worker.py")


class LlamaCpp:
    """A worker that reads ``gguf`` with room for ``room`` tokens on ``threads``.

    ``about`` is what it says of its build, ``peak_mb`` its peak memory so far.
    It sleeps while it is not asked, so that it and this process take turns.
    """

    def __init__(
        self, python: Path, gguf: Path, room: int, threads: int, worker: Path = WORKER
    ) -> None:
        self.python, self.threads, self.peak_mb = python, threads, 0.0
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [python, "-I", worker, gguf, str(room), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.about = self._heard()

    def prefill(self, side: str, tokens: torch.Tensor) -> Seconds:
        """Time the reading of ``tokens`` [1, S] into an empty context."""
        return self._timed("prefill", side, tokens)

    def decode(self, side: str, tokens: torch.Tensor) -> Seconds:
        """Time ``tokens`` [1, S] read one by one behind the prompt, then forgotten."""
        return self._timed("decode", side, tokens)

    def logits(self, side: str, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits [S, vocab] of ``tokens`` [1, S], read one by one."""
        ids = tokens[0].tolist()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "logits"
            self._ask(do="logits", side=side, tokens=ids, path=str(path))
            raw = bytearray(path.read_bytes())
        return torch.frombuffer(raw, dtype=torch.float32).view(len(ids), -1)

    def close(self) -> None:
        """End the worker: it ends with its input."""
        self._process.communicate()
        self._log.close()

    def _timed(self, do: str, side: str, tokens: torch.Tensor) -> Seconds:
        found = self._ask(do=do, side=side, tokens=tokens[0].tolist())
        wall = found["seconds"]
        return Seconds(wall, found["cpu_seconds"] / (wall * self.threads))

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._broken("it ended") from None
        found = self._heard()
        if "error" in found:
            raise self._broken(found["error"])
        self.peak_mb = max(self.peak_mb, found.get("peak_mb", 0.0))
        return found

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise self._broken(f"it ended or said {line!r}") from None

    def _broken(self, cause: str) -> GraphoptError:
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        said = "; ".join(self._log.read().strip().splitlines()[-3:]) or "nothing"
        return GraphoptError(
            f"bench llama-cpp: the worker cannot go on: {cause}; its last words: "
            f"{said}. Does {self.python} run `import llama_cpp`?"
        )
