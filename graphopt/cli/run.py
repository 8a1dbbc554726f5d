"""``graphopt run``: generate with the compiled model, beside other backends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.arguments import Config, Dtype, Json, Model, dtype_of
from graphopt.cli.ensemble import EnsembleJob, measure_ensemble, sides
from graphopt.cli.output import print_json, print_table, progress, stdout
from graphopt.cli.split import Split
from graphopt.cli.split_side import measure_split
from graphopt.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from graphopt.cli.side import Outcome


def run(
    model: Model = "",
    config: Config = None,
    ensemble: Annotated[
        str, typer.Option(help="A TOML file that names the members of an ensemble.")
    ] = "",
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="A file with the prompt; - reads stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 64,
    compare: Annotated[
        str,
        typer.Option(
            help="Backends to run too: inductor, eager, or both; beside an ensemble "
            "also base and tuned, members that generate alone."
        ),
    ] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Do not apply the model's chat template.")
    ] = False,
    minimum_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Exit 1 below this top-1 agreement.")
    ] = 0.0,
    dtype: Dtype = "float32",
    tp: Annotated[
        int, typer.Option(min=1, help="Ranks that share out each layer (torchrun).")
    ] = 1,
    pp: Annotated[
        int, typer.Option(min=1, help="Stages of layers, one a rank (torchrun).")
    ] = 1,
    rank_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that ranks wait for one another.")
    ] = 600.0,
    as_json: Json = False,
) -> None:
    """Generate greedily from a prompt and say how fast, with what memory.

    Each backend runs in a process of its own, compiled first; times are without
    compilation. Agreement is over the next-token distributions along the tokens of the
    first backend compared.

    With --tp or --pp torchrun starts the processes, which hold the model together; each
    side then runs in all of them, one after the other, and rank 0 prints.

    Example: graphopt run smollm2 --prompt "Why is the sky blue?" --compare inductor

    Example: graphopt run --ensemble ensemble.toml --prompt "2 + 2 =" --compare base

    Example: torchrun --nproc-per-node 2 -m graphopt run ./model --tp 2 --prompt "Hi"
    """
    split = Split(tp, pp, rank_timeout)
    split.check(ensemble=bool(ensemble), stdin=prompt_file == "-")
    if bool(model) == bool(ensemble):
        raise ConfigError("give either MODEL or --ensemble")
    if ensemble and raw:
        raise ConfigError("--raw: an ensemble's file says who reads a chat template")
    others = sides(compare) if ensemble else _backends(compare)
    text = _prompt_text(prompt, prompt_file)
    dtype_of(dtype)
    if ensemble:
        job = EnsembleJob("", ensemble, text, max_new_tokens, config, dtype)
        outcomes = measure_ensemble(job, others)
    elif split.ranks > 1:
        outcomes = measure_split(
            split, model, config, text, max_new_tokens, others, raw, dtype
        )
    else:
        outcomes = measure(model, config, text, max_new_tokens, others, raw, dtype)
    rows = [row(outcomes[0], o) for o in outcomes]
    if not split.prints:
        pass
    elif as_json:
        print_json({"results": rows, "remarks": remark_counts(outcomes)})
    else:
        print_outcomes(outcomes, rows)
    if any(r.get("top1_agreement", 1.0) < minimum_agreement for r in rows):
        raise typer.Exit(1)


def _backends(compare: str) -> list[str]:
    names = [n.strip() for n in compare.split(",") if n.strip()]
    known = ("inductor", "eager")
    for name in names:
        if name not in known:
            raise ConfigError(f"--compare {name}: unknown{did_you_mean(name, known)}")
    return names


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give either --prompt or --prompt-file")
    if prompt_file is None:
        text = prompt or ""
    else:
        try:
            text = sys.stdin.read() if prompt_file == "-" else _read(prompt_file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {prompt_file}: {error}") from None
    if not text.strip():
        raise ConfigError("the prompt is empty")
    return text


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def measure(
    model: str,
    config: str | None,
    text: str,
    max_new_tokens: int,
    others: list[str],
    raw: bool = False,
    dtype: str = "float32",
) -> list[Outcome]:
    """Run the compared backends and graphopt, in that order; return their outcomes."""
    from graphopt.cli.side import Job, run_apart
    from graphopt.config import load_config

    load_config(config)
    with progress(f"reading {model}'s tokenizer"):
        prompt = prompt_tokens(model, text, raw)
    outcomes: list[Outcome] = []
    for backend in [*others, "graphopt"]:
        job = Job(backend, model, prompt, max_new_tokens, config, dtype)
        with progress(f"{backend}: compiling, then {len(prompt)} tokens of prompt"):
            forced = outcomes[0].tokens if outcomes else None
            outcomes.append(run_apart(job, forced))
    return outcomes


def prompt_tokens(model: str, text: str, raw: bool) -> tuple[int, ...]:
    """Return the ids of ``text``, in the model's chat template unless ``raw``."""
    from graphopt.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    if raw or not tokenizer.chat_template:
        return tuple(tokenizer(text).input_ids)
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    )
    return tuple(tokenizer(rendered, add_special_tokens=False).input_ids)


def row(reference: Outcome, outcome: Outcome) -> dict[str, Any]:
    """Return one side's figures, its agreement with the reference among them."""
    from graphopt.agreement import agreement

    figures = {k: v for k, v in outcome.as_dict().items() if k != "reports"}
    if outcome is not reference and outcome.logits is not None:
        figures |= agreement(reference.logits, outcome.logits)
    return figures


def remark_counts(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Count graphopt's remarks by pass, kind and code, with one message of each."""
    counts: dict[tuple[str, str, str], dict[str, Any]] = {}
    for report in outcomes[-1].reports:
        for remark in report["remarks"]:
            key = (remark["pass_name"], remark["kind"], remark["code"])
            entry = counts.setdefault(key, {"count": 0, "message": remark["message"]})
            entry["count"] += 1
    names = ("pass", "kind", "code")
    return [{**dict(zip(names, k, strict=True)), **v} for k, v in counts.items()]


_COLUMNS = {
    "backend": "backend",
    "prefill_seconds": "prefill s",
    "decode_tokens_per_second": "decode tok/s",
    "peak_mb": "peak MB",
    "compile_seconds": "compile s",
    "utilisation": "CPU use",
    "top1_agreement": "top-1 agreement",
    "mean_kl": "mean KL",
}


def print_outcomes(outcomes: list[Outcome], rows: list[dict[str, Any]]) -> None:
    """Print each text, the figures side by side, and what the passes did."""
    for outcome in outcomes:
        stdout().print(f"[bold]{outcome.backend}[/]:", end=" ")
        print(outcome.text.strip() + "\n")
    print_table(
        "", list(_COLUMNS.values()), [[r.get(c) for c in _COLUMNS] for r in rows]
    )
    counts = remark_counts(outcomes)
    columns = ("pass", "kind", "code", "count", "message")
    print_table("remarks", columns, [[c[k] for k in columns] for c in counts])
    for directory in outcomes[-1].directories:
        print(f"report and graph diffs: {directory}")
    for kernel in sorted({k for r in outcomes[-1].reports for k in r["kernels"]}):
        print(f"kernel: {kernel}")
    if any(o.utilisation < 0.9 for o in outcomes):
        print("CPU use under 0.9: other work shared the cores; do not trust the times")
