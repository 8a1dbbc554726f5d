"""``graphopt bench``: run a script of benchmarks/ and print its table."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli.output import print_json, print_table
from graphopt.errors import ConfigError, did_you_mean


def bench(
    name: Annotated[
        str, typer.Argument(help="A script of benchmarks/, without .py (token-drop).")
    ],
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Small sizes: shows that it runs, no figures."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one line of JSON.")
    ] = False,
) -> None:
    """Run a benchmark, print its table, and keep it under benchmarks/results/.

    Example: graphopt bench attention --quick
    """
    folder = benchmarks_folder()
    scripts = {
        p.stem.replace("_", "-"): p
        for p in folder.glob("*.py")
        if "\ndef main(" in p.read_text()
    }
    name, names = name.replace("_", "-"), scripts.keys()
    if name not in names:
        raise ConfigError(f"no benchmark '{name}'{did_you_mean(name, names)}")
    # Whatever a benchmark says while it runs is progress; stdout is for its result.
    with contextlib.redirect_stdout(sys.stderr):
        result = _load(scripts[name]).main(quick=quick)
    if as_json:
        print_json(result)
        return
    rows = result["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table(name, columns, [[row.get(c) for c in columns] for row in rows])
    print_table("summary", ("figure", "value"), result["summary"].items())


def benchmarks_folder() -> Path:
    """Return benchmarks/ of this directory or of the checkout graphopt runs from."""
    import graphopt

    roots = [Path.cwd(), Path(graphopt.__file__).resolve().parents[1]]
    for root in roots:
        if (root / "benchmarks" / "harness.py").exists():
            return root / "benchmarks"
    raise ConfigError("no benchmarks/ here: run it from a checkout of graphopt")


def _load(script: Path) -> Any:
    sys.path.insert(0, str(script.parent.parent))
    spec = importlib.util.spec_from_file_location(f"benchmarks.{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
