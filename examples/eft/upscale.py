"""Does a large base plus a small model's fine-tuning beat both?

    python -m examples.eft.upscale [--steps 1000] [--tuning 150] [--out FOLDER]

Trains a small and a large Llama on general text, fine-tunes the small one on a task,
and judges large + beta * (small tuned - small) by held-out text of the task. ``beta``
is chosen on validation blocks and reported on test blocks, beside the large model
alone, the small tuned one alone, and the large one fine-tuned directly, which
up-scaling is to do without.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import graphopt
from examples.eft.data import Text, texts
from examples.eft.train import RATE, kept, loss_of, model, train
from graphopt.cli.output import print_table

SIZES = {"small": (96, 3), "large": (256, 4)}  # hidden size, layers
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of each base")
    parser.add_argument("--tuning", type=int, default=150, help="steps on the task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("eft-models"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = texts()
    models, seconds = _models(given, found)
    result = report(models, found["task"], found["general"])
    facts = {"steps": given.steps, "tuning": given.tuning, "seed": given.seed}
    result |= facts | {"cpu_seconds": seconds}
    (given.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    _print(result)


def _models(given: Any, found: dict[str, Text]) -> tuple[dict[str, Any], Any]:
    """Return the two bases and the two tuned models; what is there is not retrained."""
    made: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, size in SIZES.items():
        general, task = found["general"].train, found["task"].train
        run = (given.steps, RATE[name], given.seed, name)
        made[name] = _made(given.out / name, model(*size, given.seed), general, run)
        twin = model(*size, given.seed)
        twin.load_state_dict(made[name][0].state_dict())
        tuned = f"{name}-tuned"
        run = (given.tuning, RATE["tuned"], given.seed + 1, tuned)
        made[tuned] = _made(given.out / tuned, twin, task, run)
    for name, (_, used) in made.items():
        seconds[name] = round(used, 1)
    return {name: net for name, (net, _) in made.items()}, seconds


def _made(folder: Path, net: Any, ids: Any, run: Any) -> tuple[Any, float]:
    if (old := kept(folder)) is not None:
        return old, 0.0
    used = train(net, ids, *run)
    net.save_pretrained(folder)
    return net, used


def report(models: dict[str, Any], task: Text, general: Text) -> dict[str, Any]:
    """Return losses in nats a byte on the task's test blocks, and beta's sweep."""
    made = graphopt.ensemble(models["large"], models["small-tuned"], models["small"])
    sweep = []
    for beta in BETAS:
        made.beta.fill_(beta)
        both = [loss_of(made, blocks) for blocks in (task.validation, task.test)]
        sweep.append({"beta": beta, "validation": both[0], "test": both[1]})
    best = min(sweep, key=lambda row: row["validation"])
    losses = {name: loss_of(net, task.test) for name, net in models.items()}
    losses["ensemble, beta 1"] = next(r["test"] for r in sweep if r["beta"] == 1.0)
    losses[f"ensemble, beta {best['beta']:g} (validation)"] = best["test"]
    parameters = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
    return {
        "task_test_loss": losses,
        "general_test_loss": {n: loss_of(m, general.test) for n, m in models.items()},
        "sweep": sweep,
        "parameters": parameters,
        "beats_both": losses["ensemble, beta 1"]
        < min(losses["large"], losses["small-tuned"]),
    }


def _print(result: dict[str, Any]) -> None:
    losses = result["task_test_loss"]
    rows = [(name, loss, math.exp(loss)) for name, loss in losses.items()]
    columns = ("model", "loss, nats a byte", "perplexity a byte")
    print_table("held-out text of the task", columns, rows)
    sweep = [tuple(row.values()) for row in result["sweep"]]
    print_table("up-scaling", ("beta", "validation", "test"), sweep)
    verdict = "beats" if result["beats_both"] else "does not beat"
    print(f"at beta 1 the ensemble {verdict} both the large base and the small tuned")


if __name__ == "__main__":
    main()
