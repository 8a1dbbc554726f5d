"""One side of a comparison: a model under one backend, measured in its own process.

Each side has its own process, so that peak memory is its own, and so that no side
finds another's threads, caches or heap.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphopt.errors import GraphoptError, ModelError
from graphopt.memory import peak_mb, reset_peak

if TYPE_CHECKING:
    from graphopt.models import LoadedModel

BACKENDS = ("graphopt", "inductor", "eager")


@dataclass(frozen=True)
class Job:
    """What a side does: greedy generation after ``prompt`` (token ids), batch 1."""

    backend: str
    model: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    config: str | None = None
    dtype: str = "float32"


@dataclass
class Outcome:
    """What it measured; ``logits`` [steps, vocab] follow the forced tokens if given.

    ``utilisation`` is CPU time over wall time and threads of the prefill: much below 1
    means that other work shared the cores and that the seconds mean little.
    """

    backend: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    prefill_seconds: float = 0.0
    decode_tokens_per_second: float = 0.0
    compile_seconds: float = 0.0
    peak_mb: float = 0.0
    utilisation: float = 0.0
    logits: Any = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the logits."""
        kept = {k: v for k, v in vars(self).items() if k != "logits"}
        return {**kept, "reports": [r["remarks"] for r in self.reports]}


def run_apart(job: Job, forced: Sequence[int] | None = None) -> Outcome:
    """Run ``job`` in a fresh process; GraphoptError comes back as it was raised."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_run, job, list(forced or [])).result()


def _run(job: Job, forced: list[int]) -> Outcome:
    try:
        return _measure(job, forced)
    except GraphoptError:
        raise
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, GraphoptError):
            raise inner from None
        # Dynamo's exceptions hold frames, which no pipe can carry.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _measure(job: Job, forced: list[int]) -> Outcome:
    from graphopt.models import load

    return measure_loaded(job, forced, load(job.model, getattr(torch, job.dtype)))


def measure_loaded(job: Job, forced: Sequence[int], loaded: LoadedModel) -> Outcome:
    """Run ``job`` with a model that is loaded, or this rank's part of one.

    With ``forced`` tokens the logits follow these and not the ones generated.
    """
    if loaded.tokenizer is None or not loaded.model.can_generate():  # type: ignore[operator]
        raise ModelError(f"{job.model}: not a language model with a tokenizer")
    use_backend(loaded.model, job.backend, job.config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sharded = any(hasattr(p, "placements") for p in loaded.model.parameters())
    model: Any = loaded.model if sharded else loaded.model.to(device)
    outcome = Outcome(job.backend)
    prompt = torch.tensor([job.prompt], device=device)
    with torch.no_grad():
        start = time.perf_counter()
        new_cache = _cache_of(job, loaded.model)
        _generate(model, prompt, 3, (), new_cache())
        warm = time.perf_counter() - start
        reset_peak()
        cache = new_cache()
        _timed_generation(model, prompt, job.max_new_tokens, outcome, cache)
        outcome.compile_seconds = max(0.0, warm - outcome.prefill_seconds)
        outcome.peak_mb = peak_mb()
        follow = forced or outcome.tokens
        logits = _follow(model, prompt, follow, new_cache())
        outcome.logits = logits.float().cpu().numpy()
    outcome.text = loaded.tokenizer.decode(outcome.tokens, skip_special_tokens=True)
    if job.backend == "graphopt":
        _add_reports(outcome)
    return outcome


def _cache_of(job: Job, model: Any) -> Callable[[], Any]:
    """Return what makes the cache that the config's passes need, else None."""
    from graphopt.runtime.cache import Cache, wanted_by

    asked = wanted_by(job.config) if job.backend == "graphopt" else None
    if asked is None:
        return lambda: None
    room = len(job.prompt) + job.max_new_tokens
    return lambda: Cache.from_config(job.config, model, max_tokens=room)


def use_backend(model: Any, backend: str, config: str | None) -> None:
    """Make ``model(...)`` and ``model.generate`` run compiled code, or leave it eager.

    ``torch.compile(model).generate`` would run the original forward; replacing the
    model's forward does not.
    """
    if backend == "eager":
        return
    options: Any = {"config": config} if backend == "graphopt" else None
    model.forward = torch.compile(
        model.forward, backend=backend, dynamic=True, options=options
    )


def _timed_generation(
    model: Any, prompt: torch.Tensor, steps: int, outcome: Outcome, cache: Any
) -> None:
    clock = _Clock()
    stop = _stop_tokens(model)
    outcome.tokens = _generate(model, prompt, steps, stop, cache, clock.prefill_done)
    outcome.prefill_seconds = clock.prefill
    outcome.utilisation = clock.utilisation
    decoded = max(len(outcome.tokens) - 1, 0)
    outcome.decode_tokens_per_second = decoded / max(clock.since_prefill(), 1e-9)


class _Clock:
    """Seconds of the prefill, and since."""

    def __init__(self) -> None:
        self.start, self.cpu = time.perf_counter(), time.process_time()
        self.prefill = self.utilisation = 0.0

    def prefill_done(self) -> None:
        self.prefill = time.perf_counter() - self.start
        used = time.process_time() - self.cpu
        self.utilisation = used / (self.prefill * torch.get_num_threads())

    def since_prefill(self) -> float:
        return time.perf_counter() - self.start - self.prefill


def _generate(
    model: Any,
    prompt: torch.Tensor,
    steps: int,
    stop: Sequence[int],
    cache: Any,
    prefill_done: Callable[[], None] = lambda: None,
) -> list[int]:
    """Return greedy tokens; the last logits alone are computed, as `generate` does."""
    output = _start(model, prompt, cache)
    tokens = [int(output.logits[0, -1].argmax())]
    prefill_done()
    while len(tokens) < steps and tokens[-1] not in stop:
        output = _step(model, tokens[-1], prompt, output.past_key_values)
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens


def _start(model: Any, prompt: torch.Tensor, cache: Any) -> Any:
    own = {} if cache is None else {"past_key_values": cache}
    return model(prompt, use_cache=True, logits_to_keep=1, **own)


def _follow(
    model: Any, prompt: torch.Tensor, tokens: Sequence[int], cache: Any
) -> torch.Tensor:
    """Return the next-token logits [len(tokens), vocab] along given tokens."""
    output = _start(model, prompt, cache)
    rows = [output.logits[0, -1]]
    for token in tokens[:-1]:
        output = _step(model, token, prompt, output.past_key_values)
        rows.append(output.logits[0, -1])
    return torch.stack(rows)


def _step(model: Any, token: int, prompt: torch.Tensor, cache: Any) -> Any:
    ids = torch.tensor([[token]], device=prompt.device)
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _stop_tokens(model: Any) -> tuple[int, ...]:
    stop = model.generation_config.eos_token_id
    return tuple(stop) if isinstance(stop, list) else (stop,)


def _add_reports(outcome: Outcome) -> None:
    from graphopt.backend import last_reports

    for report in last_reports():
        outcome.reports.append(report.as_dict())
        if report.directory is not None:
            outcome.directories.append(str(report.directory))
