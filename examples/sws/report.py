"""What was seen, as a page: the paper's claims beside the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from examples.sws.data import Data
from examples.sws.family import Plan, Trained

Runs = Mapping[int, Sequence[Trained]]


def report(name: str, data: Data, plan: Plan, runs: Runs) -> str:
    """Return the Markdown of all runs of one set of digits."""
    first = next(iter(runs.values()))
    lines = [f"# SWS on {name}", "", _about(data, plan, runs), ""]
    lines += _table(["model", "layers", "epochs", "accuracy", "seconds", "parameters"])
    for index, row in enumerate(first):
        same = [rows[index] for rows in runs.values()]
        seen = _spread([r.accuracy for r in same], 100.0)
        seconds = sum(r.seconds for r in same) / len(same)
        cells = [row.kind, row.depth, row.epochs, seen, f"{seconds:.1f}"]
        lines.append(_line([*cells, f"{row.parameters:,}"]))
    lines += ["", "## The paper's claims, here", "", *_claims(plan, runs)]
    return "\n".join(lines) + "\n"


def _about(data: Data, plan: Plan, runs: Runs) -> str:
    return (
        f"Written by `python -m examples.sws.run`. {len(data.train):,} images to train "
        f"on, {len(data.test):,} to test; ViT of {plan.hidden} channels, 4 heads, 17 "
        f"tokens. The auxiliary model has stages of {list(plan.stages)} layers and "
        "learns the teacher's outputs alone, from random values (alpha 1, T 1, KL by "
        f"{plan.divide}); descendants and models from scratch learn labels. Accuracy "
        f"in % {_of_seeds(runs)}; "
        "seconds are processor time of a training, the teacher's outputs included; "
        f"torch {version('torch')}, transformers {version('transformers')}."
    )


def _of_seeds(runs: Runs) -> str:
    names = ", ".join(map(str, runs))
    if len(runs) == 1:
        return f"of one seed ({names})"
    return f"as mean (least to greatest) of seeds {names}"


def _claims(plan: Plan, runs: Runs) -> list[str]:
    short, longest = min(plan.tuned), max(plan.scratch)
    lines = []
    for depth in plan.depths:
        one = _mean(runs, "descendant", depth, short)
        parts = [f"{depth} layers: after {short} epoch(s) {one:.1f} %"]
        for epochs in plan.scratch:
            other = _mean(runs, "scratch", depth, epochs)
            parts.append(f"from scratch {other:.1f} % after {epochs}")
        lines.append(f"- {'; '.join(parts)}.")
    lines += [*_sizes(plan, runs), *_seconds(plan, runs, longest)]
    return lines


def _sizes(plan: Plan, runs: Runs) -> list[str]:
    rows = next(iter(runs.values()))
    auxiliary = next(r for r in rows if r.kind == "auxiliary").parameters
    family = sum(
        next(r for r in rows if (r.kind, r.depth) == ("scratch", d)).parameters
        for d in plan.depths
    )
    depth = max(plan.depths)
    whole = next(r for r in rows if (r.kind, r.depth) == ("scratch", depth)).parameters
    return [
        f"- Stored: {auxiliary:,} parameters in the auxiliary model, which start all "
        f"depths; {family:,} in a pretrained model of each of the {len(plan.depths)} "
        f"({family / auxiliary:.1f} times), {whole:,} in the deepest alone "
        f"({whole / auxiliary:.1f} times)."
    ]


def _seconds(plan: Plan, runs: Runs, longest: int) -> list[str]:
    def total(kind: str, epochs: int | None = None) -> float:
        sums = [
            sum(
                r.seconds for r in rows if r.kind == kind and epochs in (None, r.epochs)
            )
            for rows in runs.values()
        ]
        return sum(sums) / len(sums)

    tuned = max(plan.tuned)
    tune, scratch = total("descendant", tuned), total("scratch", longest)
    auxiliary, teacher = total("auxiliary"), total("teacher")
    ours = auxiliary + tune
    return [
        f"- Training of all {len(plan.depths)} depths: {ours:.0f} s (auxiliary model "
        f"{auxiliary:.0f}, then {tuned} epochs each {tune:.0f}), and {teacher:.0f} s "
        f"for the teacher; from scratch with {longest} epochs each {scratch:.0f} s: "
        f"{scratch / ours:.2f} times without the teacher, "
        f"{scratch / (ours + teacher):.2f} times with it."
    ]


def _mean(runs: Runs, kind: str, depth: int, epochs: int) -> float:
    wanted = (kind, depth, epochs)
    seen = [
        r.accuracy
        for rows in runs.values()
        for r in rows
        if (r.kind, r.depth, r.epochs) == wanted
    ]
    return 100.0 * sum(seen) / len(seen)


def _spread(values: Sequence[float], scale: float) -> str:
    mean, low, high = sum(values) / len(values), min(values), max(values)
    whole = [scale * v for v in (mean, low, high)]
    if len(values) == 1:
        return f"{whole[0]:.1f}"
    return "{:.1f} ({:.1f} to {:.1f})".format(*whole)


def _table(columns: Sequence[str]) -> list[str]:
    return [_line(columns), _line(["---"] * len(columns))]


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
