"""``graphopt run --ensemble``: generate with an ensemble, beside other backends."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.cli.output import progress
from graphopt.errors import ConfigError, GraphoptError, did_you_mean

if TYPE_CHECKING:
    from graphopt.cli.side import Outcome

SIDES = ("inductor", "eager", "base", "tuned")
"""What can be compared: the ensemble's backends, and members that generate alone."""


@dataclass(frozen=True)
class EnsembleJob:
    """What a side does: greedy generation, or by the ensemble's own settings."""

    backend: str
    path: str
    prompt: str
    max_new_tokens: int
    config: str | None = None
    dtype: str = "float32"


def sides(compare: str) -> list[str]:
    """Return the names of ``--compare``; ConfigError for an unknown one."""
    names = [n.strip() for n in compare.split(",") if n.strip()]
    for name in names:
        if name not in SIDES:
            raise ConfigError(f"--compare {name}: unknown{did_you_mean(name, SIDES)}")
    return names


def measure_ensemble(job: EnsembleJob, others: list[str]) -> list[Outcome]:
    """Run the compared sides and graphopt's ensemble, each in a fresh process."""
    from graphopt.config import load_config
    from graphopt.ensembles.config import read_config

    if not Path(job.path).exists():
        raise ConfigError(f"--ensemble {job.path}: no such file")
    read_config(job.path)
    load_config(job.config)
    outcomes = []
    context = multiprocessing.get_context("spawn")
    for backend in [*others, "graphopt"]:
        own = EnsembleJob(backend, *(vars(job)[n] for n in list(vars(job))[1:]))
        with (
            progress(f"{backend}: compiling, then the prompt"),
            ProcessPoolExecutor(max_workers=1, mp_context=context) as pool,
        ):
            outcomes.append(pool.submit(_run, own).result())
    return outcomes


def _run(job: EnsembleJob) -> Outcome:
    try:
        return _measure(job)
    except GraphoptError:
        raise
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, GraphoptError):
            raise inner from None
        # Dynamo's exceptions hold frames, which no pipe can carry.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _measure(job: EnsembleJob) -> Outcome:
    import torch

    from graphopt.cli.side import Outcome, _add_reports
    from graphopt.ensembles.load import load_ensemble
    from graphopt.memory import peak_mb, reset_peak

    loaded = load_ensemble(job.path, getattr(torch, job.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = _generator(job, loaded, device)
    settings: dict[str, Any] = {"do_sample": False, "use_cache": True}
    outcome = Outcome(job.backend)
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=3, **settings)
    warm = time.perf_counter() - start
    reset_peak()
    clock = _Clock()
    settings |= {"max_new_tokens": job.max_new_tokens, "streamer": clock}
    cpu = time.process_time()
    ids = model.generate(**inputs, **settings)
    wall = clock.last - clock.start
    outcome.utilisation = (time.process_time() - cpu) / (wall * torch.get_num_threads())
    outcome.prefill_seconds = clock.first - clock.start
    outcome.compile_seconds = max(0.0, warm - outcome.prefill_seconds)
    outcome.tokens = ids[0, inputs["inputs"].shape[1] :].tolist()
    decoded = max(len(outcome.tokens) - 1, 0)
    outcome.decode_tokens_per_second = decoded / max(clock.last - clock.first, 1e-9)
    outcome.peak_mb = peak_mb()
    outcome.text = loaded.tokenizer.decode(outcome.tokens, skip_special_tokens=True)
    if job.backend == "graphopt":
        _add_reports(outcome)
    return outcome


def _generator(job: EnsembleJob, loaded: Any, device: str) -> tuple[Any, Any]:
    """Return what generates, compiled, and its inputs."""
    from graphopt.backend import compile

    made = loaded.model.to(device)
    inputs = loaded.inputs(job.prompt)
    if job.backend in ("base", "tuned"):
        place = 0 if job.backend == "base" else made.pairs[0][0]
        own = inputs.get("tuned_input_ids", [None])[0] if place else None
        inputs = {"inputs": inputs["inputs"] if own is None else own}
        return compile(made.members[place], job.config), inputs
    if job.backend == "inductor":
        made.compile(dynamic=True)
    elif job.backend == "graphopt":
        compile(made, job.config)
    return made, inputs


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.start = self.first = self.last = time.perf_counter()
        self._calls = 0

    def put(self, value: Any) -> None:
        self.last = time.perf_counter()
        self._calls += 1
        if self._calls <= 2:  # the prompt, then the first token
            self.first = self.last

    def end(self) -> None:
        return
