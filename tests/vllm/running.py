"""Start vLLM in processes of its own, with a time limit, and read what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import socket
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
BACKEND = "graphopt.integrations.vllm.backend"
LIMIT = 900  # seconds; starting takes 30 on two cores that do nothing else
ENDING = 120
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else one of two cores is left out
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Where others use the cores too, compiling may take long.
    "VLLM_ENGINE_READY_TIMEOUT_S": str(LIMIT),
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(LIMIT),
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


def generate(
    model: Path,
    settings: Mapping[str, Any],
    prompts: list[list[int]],
    tokens: int,
    extra_args: Mapping[str, Any] | None = None,
    **llm: Any,
) -> list[list[int]]:
    """Return the tokens that vLLM generates greedily; AssertionError with its log."""
    how = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 4,
        "compilation_config": {"mode": 2, "backend": BACKEND},
        "additional_config": {"graphopt": dict(settings)},
        **llm,
    }
    job = {"llm": how, "prompts": prompts, "tokens": tokens, "extra_args": extra_args}
    command = [sys.executable, "-m", "tests.vllm.offline"]
    # One rank needs no process of its own, which saves two imports of vLLM.
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if not _ranks(llm) else {}
    status, out = finished(command, json.dumps(job), alone)
    found = [line for line in out.splitlines() if line.startswith("TOKENS ")]
    assert status == 0 and found, out[-6000:]
    return json.loads(found[-1].removeprefix("TOKENS "))


@contextmanager
def serving(
    model: Path, settings: Mapping[str, Any], log: Path, *flags: str
) -> Iterator[str]:
    """Serve ``model`` as "it" and yield the address, once it answers.

    Behind the block the server is asked to end; AssertionError with what it said where
    it does not start, or where it or one of its processes does not end.
    """
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "it", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512"]
    command += ["-cc.mode=2", f"-cc.backend={BACKEND}", "--max-num-seqs", "4", *flags]
    command += ["--additional-config", json.dumps({"graphopt": dict(settings)})]
    with log.open("w") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file}
        with started(command, **pipes) as process:
            wait(lambda: process.poll() is not None or _answers(port), log, LIMIT)
            assert process.poll() is None, log.read_text()[-6000:]
            yield f"http://127.0.0.1:{port}/v1"
            process.send_signal(signal.SIGTERM)
            wait(lambda: process.poll() is not None, log, ENDING)
            wait(lambda: not alive(process.pid), log, ENDING)
            assert process.returncode in (0, -signal.SIGTERM), log.read_text()[-6000:]


def wait(condition: Callable[[], bool], log: Path, seconds: float) -> None:
    """Return once ``condition`` holds; AssertionError with the log after that time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"over {seconds} s: {log.read_text()[-6000:]}"
        time.sleep(0.5)


def _answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30):
            return True
    except OSError:
        return False


def alive(group: int) -> list[str]:
    """Return the processes of ``group`` that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended just now
            name, _, fields = path.read_text().rpartition(")")
            state, _, own = fields.split()[:3]
            if int(own) == group and state != "Z":
                found.append(name)
    return found


def _ranks(llm: Mapping[str, Any]) -> bool:
    """Tell whether there are several."""
    sizes = (llm.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    return max(sizes) > 1


def finished(
    command: list[str], text: str, variables: Mapping[str, str]
) -> tuple[int, str]:
    """Run ``command`` on ``text``; return its status and all that was printed.

    All processes that it started end with it, also when the time is over.
    """
    with started(command, variables) as process:
        try:
            out, _ = process.communicate(text, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            raise AssertionError(f"over {LIMIT} s: {out[-6000:]}") from None
        return process.returncode, out


@contextmanager
def started(
    command: list[str], variables: Mapping[str, str] | None = None, **more: Any
) -> Iterator[subprocess.Popen[str]]:
    """Start ``command`` in a session of its own, and end all of it behind the block."""
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        **more,
    }
    environment = {**os.environ, **_ENVIRONMENT, **(variables or {})}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        start_new_session=True,
        **pipes,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
