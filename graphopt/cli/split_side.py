"""``graphopt run`` under torchrun: every rank runs this, and rank 0 prints."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from graphopt.cli.output import progress
from graphopt.cli.split import Split, check_heads
from graphopt.errors import RanksError

if TYPE_CHECKING:
    from graphopt.cli.side import Job, Outcome
    from graphopt.distributed.ranks import Ranks
    from graphopt.models import LoadedModel


def measure_split(
    split: Split,
    model: str,
    config: str | None,
    text: str,
    max_new_tokens: int,
    others: list[str],
    raw: bool,
    dtype: str,
) -> list[Outcome]:
    """Run the compared backends and graphopt on all ranks; return rank 0's outcomes.

    Raises RanksError on every rank where one is lost or runs something else.
    """
    from graphopt.cli.side import Job
    from graphopt.distributed.ranks import joined

    job = Job("graphopt", model, (), max_new_tokens, config, dtype)
    with joined(split.limit) as ranks:
        found = ranks.agreed(lambda: _asked(split, job, text, others, raw))
        prompt: tuple[int, ...] = found["the prompt"]
        outcomes: list[Outcome] = []
        for backend in [*others, "graphopt"]:
            forced = outcomes[0].tokens if outcomes else []
            side = Job(backend, model, prompt, max_new_tokens, config, dtype)
            doing = f"{backend}: compiling, then {len(prompt)} tokens of prompt"
            with progress(doing) if split.prints else nullcontext():
                outcomes.append(_side(ranks, split, side, forced))
        return outcomes


def _asked(
    split: Split, job: Job, text: str, others: list[str], raw: bool
) -> dict[str, Any]:
    """Return what every rank was asked to run, with what is installed there."""
    from graphopt.cli.run import prompt_tokens
    from graphopt.distributed import fingerprint
    from graphopt.models import load_config

    architecture = load_config(job.model)
    check_heads(architecture, split.tp)
    return {
        **fingerprint.of_installation(),
        **fingerprint.of_config(job.config),
        **fingerprint.of_architecture(architecture),
        "the split": (split.tp, split.pp),
        "what is compared": tuple(others),
        "the weights' type": job.dtype,
        "the number of tokens": job.max_new_tokens,
        "the prompt": prompt_tokens(job.model, text, raw),
    }


def _side(ranks: Ranks, split: Split, job: Job, forced: list[int]) -> Outcome:
    run = _pipelined if split.pp > 1 else partial(_shared_out, ranks)
    outcome = run(split, job, forced)
    found = ranks.gather(lambda: {"peak": outcome.peak_mb, "tokens": outcome.tokens})
    if any(said["tokens"] != outcome.tokens for said in found):
        raise RanksError("the ranks wrote different tokens: their results differ")
    outcome.peak_mb = max(said["peak"] for said in found)
    return outcome


def _shared_out(ranks: Ranks, split: Split, job: Job, forced: list[int]) -> Outcome:
    import torch

    from graphopt.cli.side import measure_loaded
    from graphopt.distributed.fingerprint import of_weights
    from graphopt.models import load

    torch._dynamo.reset()
    loaded: list[LoadedModel] = []

    def load_part() -> dict[str, str]:
        loaded.append(load(job.model, getattr(torch, job.dtype), split.tp))
        return of_weights(loaded[0].model)

    ranks.agreed(load_part)
    return measure_loaded(job, forced, loaded[0])


def _pipelined(split: Split, job: Job, forced: list[int]) -> Outcome:
    from graphopt.cli.side import Outcome
    from graphopt.integrations.pipelining.run import generate

    config = job.config if job.backend == "graphopt" else ""
    asked = (job.model, config, job.prompt, job.max_new_tokens, split.tp, split.pp)
    host = "traced" if job.backend == "eager" else "inductor"
    found = generate(*asked, forced=forced, dtype=job.dtype, host=host)
    folders = [r.directory for r in found.reports if r.directory is not None]
    return Outcome(
        job.backend,
        found.tokens,
        found.text,
        found.prefill_seconds,
        max(len(found.tokens) - 1, 0) / max(found.decode_seconds, 1e-9),
        found.compile_seconds,
        found.peak_mb,
        found.utilisation,
        None if found.logits is None else found.logits.numpy(),
        [report.as_dict() for report in found.reports],
        [str(folder) for folder in folders],
    )
