"""A question about a long text: dense Inductor and graphopt side by side.

The text is CPython's language reference, the model SmolLM2-135M-Instruct. Each side
runs in a process of its own. Options: --tokens N (4096 to 8192), --config FILE.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graphopt.agreement import agreement
from graphopt.cli.side import Job, Outcome, run_apart
from graphopt.models import load_tokenizer
from graphopt.texts import language_reference

CONFIG = Path(__file__).parent / "vertical-slash.toml"
QUESTION = "What does the 'with' statement of Python do? Answer in two sentences."
SIDES = ("inductor", "graphopt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6144, help="of the prompt")
    parser.add_argument("--config", default=str(CONFIG), help="pass config")
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    console = Console()
    prompt = _prompt(options.tokens)
    console.print(f"prompt: {len(prompt)} tokens of the language reference; {QUESTION}")
    outcomes: dict[str, Outcome] = {}
    for side in SIDES:
        config = options.config if side == "graphopt" else None
        job = Job(side, "smollm2", prompt, options.new_tokens, config)
        forced = outcomes["inductor"].tokens if outcomes else None
        with console.status(f"{side}: compiling and running"):
            outcomes[side] = run_apart(job, forced)
    _print(console, outcomes)


def _prompt(tokens: int) -> tuple[int, ...]:
    """Return a chat prompt of exactly ``tokens`` tokens; the text gives way."""
    tokenizer = load_tokenizer("smollm2")
    text = tokenizer(language_reference()[: 8 * tokens]).input_ids

    def chat(length: int) -> list[int]:
        body = f"{tokenizer.decode(text[:length])}\n\n{QUESTION}"
        messages = [{"role": "user", "content": body}]
        return list(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        )

    return tuple(chat(tokens - len(chat(0))))


def _print(console: Console, outcomes: dict[str, Outcome]) -> None:
    dense, fast = (outcomes[side] for side in SIDES)
    for side, outcome in outcomes.items():
        console.print(f"\n[bold]{side}[/bold]: {outcome.text.strip()}")
    table = Table("", *SIDES, "ratio")
    _row(table, "prefill, s", dense.prefill_seconds, fast.prefill_seconds)
    rates = (dense.decode_tokens_per_second, fast.decode_tokens_per_second)
    _row(table, "decode, tokens/s", *rates)
    _row(table, "compile, s", dense.compile_seconds, fast.compile_seconds)
    _row(table, "peak memory, MB", dense.peak_mb, fast.peak_mb)
    console.print(table)
    agreed = agreement(dense.logits, fast.logits)
    console.print(
        f"next-token distributions along dense's answer: top-1 agreement "
        f"{agreed['top1_agreement']:.2f}, mean KL {agreed['mean_kl']:.4f} nats"
    )
    _print_reports(console, fast)


def _row(table: Table, name: str, dense: float, fast: float) -> None:
    table.add_row(name, f"{dense:.2f}", f"{fast:.2f}", f"{fast / dense:.2f}")


def _print_reports(console: Console, fast: Outcome) -> None:
    for report, directory in zip(fast.reports, fast.directories, strict=True):
        counts: dict[tuple[Any, ...], int] = {}
        for remark in report["remarks"]:
            key = (remark["pass_name"], remark["kind"], remark["code"])
            key += (remark["message"],)
            counts[key] = counts.get(key, 0) + 1
        console.print(f"\n[bold]{report['kind']}[/bold] graph, report and diff:")
        console.print(f"  {directory}", soft_wrap=True)
        for (name, kind, code, message), count in counts.items():
            console.print(f"  {count} x {name or 'graph'}: {kind} \\[{code}] {message}")
    kernels = sorted({path for report in fast.reports for path in report["kernels"]})
    for path in kernels:
        console.print(f"emitted kernel: {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
