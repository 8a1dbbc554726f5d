"""``graphopt run`` under torchrun: every rank runs this, and rank 0 prints."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graphopt.cli.output import progress
from graphopt.errors import ConfigError, RanksError

if TYPE_CHECKING:
    from graphopt.cli.side import Job, Outcome
    from graphopt.distributed.ranks import Ranks
    from graphopt.models import LoadedModel


@dataclass(frozen=True)
class Split:
    """How a model lies on ranks: ``tp`` share each layer, ``pp`` stages follow.

    ``limit``: seconds that ranks wait for one another.
    """

    tp: int
    pp: int
    limit: float

    @property
    def ranks(self) -> int:
        """Return how many processes hold the model."""
        return self.tp * self.pp

    @property
    def prints(self) -> bool:
        """Tell whether this process prints: one of them, rank 0."""
        return self.ranks == 1 or os.environ.get("RANK", "0") == "0"

    def check(self, ensemble: bool, stdin: bool) -> None:
        """Raise ConfigError unless torchrun started as many processes as are needed."""
        known = "RANK" in os.environ
        started = int(os.environ.get("WORLD_SIZE", "1")) if known else 1
        if started != self.ranks:
            asked = f"--tp {self.tp} --pp {self.pp}: {self.ranks} process(es) hold this"
            raise ConfigError(
                f"{asked} model and {started} run; start them with: {self._command()}"
            )
        if self.ranks > 1 and ensemble:
            raise ConfigError("--tp, --pp: an ensemble runs in one process")
        if self.ranks > 1 and stdin:
            raise ConfigError(
                "--prompt-file -: ranks share no stdin; give --prompt or a file"
            )

    def _command(self) -> str:
        given = shlex.join(sys.argv[1:])
        if self.ranks == 1:
            return f"graphopt {given}"
        return f"torchrun --nproc-per-node {self.ranks} -m graphopt {given}"


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
    _check_heads(architecture, split.tp)
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


def _check_heads(config: Any, tp: int) -> None:
    """Raise ConfigError where ranks would get parts of heads."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", tp)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % tp or kv_heads % tp:
        fits = [n for n in range(1, kv_heads + 1) if not heads % n and not kv_heads % n]
        raise ConfigError(
            f"--tp {tp}: {heads} heads and {kv_heads} KV heads cannot be shared out "
            f"evenly; use --tp {' or '.join(map(str, fits))}"
        )


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
