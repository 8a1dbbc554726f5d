"""``graphopt doctor``: what is here, what is missing, how to mend it."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli.output import print_json, print_table, progress, stdout


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine; exit 1 when graphopt cannot work on it.

    Example: graphopt doctor
    """
    from graphopt.doctor import can_work, run_checks

    with progress("checking"):
        checks = run_checks()
    works = can_work(checks)
    if as_json:
        print_json({"works": works, "checks": [c.as_dict() for c in checks]})
    else:
        rows = [(c.name, c.status, c.found, c.remedy) for c in checks]
        print_table("", ("what", "status", "found", "how to mend it"), rows)
        stdout().print("graphopt works here" if works else "graphopt cannot work here")
    raise typer.Exit(0 if works else 1)
