"""A search of heads from its arguments to the written table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.codegen.cache import write_atomic
from graphopt.errors import ConfigError
from graphopt.search.calibrate import check_sizes, parse_budget
from graphopt.search.candidates import candidates
from graphopt.search.heads import SIZES, HeadSearch
from graphopt.search.partial import Partial, Say, threads_and_versions
from graphopt.search.table import best_of, read_sizes, table_text
from graphopt.search.texts import Text

_BUDGET = "0.35"


@dataclass(frozen=True)
class HeadJob:
    """What a search of heads depends on; ``command`` lacks the budget."""

    command: str
    text: Text
    tokens: int
    seed: int
    budget: str | None = None
    sizes: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Found:
    """(candidate, error) of every head, and why candidates were left out."""

    heads: tuple[tuple[str, float], ...]
    left_out: dict[str, str]


def find_heads(loaded: Any, job: HeadJob, out: Path, say: Say) -> Found:
    """Search the heads of a loaded model, write the table to ``out``.

    Raises ConfigError for arguments that
    do not fit and for a `.partial` file of another search.
    """
    budget, sizes = _budget_and_sizes(job)
    header = {
        "command": f"{job.command} --budget {budget}",
        "text": f"{job.text.origin}, sha256 {job.text.digest}",
        "tokens": job.tokens,
        "seed": job.seed,
        "budget": budget,
        "dtype": job.dtype,
        **threads_and_versions(),
    }
    settings = header | {"model": loaded.name, "candidates": _candidates_digest()}
    partial = Partial(out.with_name(out.name + ".partial"), settings)
    _take_sizes(partial, sizes, job)
    ids = job.text.excerpt(loaded.tokenizer, job.tokens, job.seed)
    search = HeadSearch(loaded.model, ids, parse_budget(budget), partial, say)
    found, layers = search.run()
    write_atomic(out, table_text(header, found, layers).encode())
    partial.remove()
    heads = tuple(head for layer in layers for head in best_of(layer))
    left_out = {k: v["reason"] for k, v in found.items() if "reason" in v}
    return Found(heads, left_out)


def _budget_and_sizes(job: HeadJob) -> tuple[str, dict[str, Any]]:
    if job.sizes is None:
        return job.budget or _BUDGET, {}
    budget, sizes = read_sizes(job.sizes)
    if job.budget not in (None, budget):
        raise ConfigError(
            f"--sizes {job.sizes}: made with --budget {budget}; leave --budget "
            f"{job.budget} out, or leave --sizes out to time anew"
        )
    check_sizes(sizes, candidates())
    return budget, sizes


def _take_sizes(partial: Partial, sizes: dict[str, Any], job: HeadJob) -> None:
    if not sizes:
        return
    known = partial.parts.get(SIZES)
    if known not in (None, sizes):
        raise ConfigError(
            f"{partial.path}: was begun with other sizes than --sizes {job.sizes}; "
            "leave --sizes out to go on, or delete the file to start anew"
        )
    partial.keep(SIZES, sizes)


def _candidates_digest() -> str:
    return hashlib.sha256(repr(candidates()).encode()).hexdigest()[:16]
