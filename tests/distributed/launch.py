"""Real processes under ``torchrun``, from a test: a time limit, rank 0's JSON line.

A script that the tests start says what it found with `say`, on every rank; rank 0's
line comes back to the test. ::

    found = launch(str(Path(__file__).parent / "some_script.py"), "argument", ranks=2)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_MARK = "RESULT "
_GRACE = 20.0  # seconds in which torchrun ends its ranks after SIGTERM


@dataclass(frozen=True)
class Finished:
    """How a run ended: ``code`` of torchrun, all ranks' output, ``seconds``."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        ended = f"torchrun ended with {self.code} after {self.seconds:.0f} s"
        return f"{ended}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


def say(value: Any) -> None:
    """Print ``value`` as the JSON line that `launch` returns; rank 0 alone does."""
    if os.environ.get("RANK", "0") == "0":
        print(_MARK + json.dumps(value), flush=True)


def launch(
    *command: str,
    ranks: int = 2,
    limit: float = 120.0,
    env: dict[str, str] | None = None,
) -> Any:
    """Run ``command`` (script and arguments) on ``ranks``; return what rank 0 says.

    AssertionError with all output if a rank fails, says nothing, or ``limit`` seconds
    pass.
    """
    done = torchrun(*command, ranks=ranks, limit=limit, env=env)
    lines = [x for x in done.stdout.splitlines() if x.startswith(_MARK)]
    assert done.code == 0 and lines, str(done)
    return json.loads(lines[-1].removeprefix(_MARK))


def torchrun(
    *command: str,
    ranks: int = 2,
    limit: float = 120.0,
    env: dict[str, str] | None = None,
) -> Finished:
    """Run ``command`` on ``ranks`` whatever it ends with; AssertionError at ``limit``.

    ``command`` may start with ``-m``. Scripts find `tests` and `graphopt`.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start = time.monotonic()
    process = subprocess.Popen(
        [*run, f"--nproc-per-node={ranks}", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(env or {}),
        cwd=ROOT,
    )
    try:
        stdout, stderr = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        stdout, stderr = _stop(process)
        late = Finished(-1, stdout, stderr, time.monotonic() - start)
        raise AssertionError(f"over the limit of {limit:.0f} s: {late}") from None
    return Finished(process.returncode, stdout, stderr, time.monotonic() - start)


def _environment(more: dict[str, str]) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    single = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **single, **more}


def _stop(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End torchrun, which ends its ranks: each is a session of its own."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()
