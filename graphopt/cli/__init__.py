"""The ``graphopt`` command: one module a subcommand, errors turned into messages here.

Exit codes: 0 done; 1 something does not work or does not agree; 2 a mistake in the
command, the config or the model's name. Nothing here imports torch: help is instant.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from graphopt import __version__
from graphopt.cli import (
    bench,
    calibrate,
    cluster,
    diff,
    doctor,
    explain,
    learngene,
    levels,
    passes,
    run,
    search,
)
from graphopt.cli.output import print_error
from graphopt.errors import ConfigError, GraphoptError, ModelError

app = typer.Typer(
    name="graphopt",
    help="Graph passes and emitted kernels for transformer inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (run.run, explain.explain, diff.diff, passes.passes, doctor.doctor):
    app.command()(command)
app.command()(bench.bench)
app.command()(search.search)
app.command()(calibrate.calibrate)
app.command()(cluster.cluster)
app.command()(levels.levels)
app.add_typer(learngene.app, name="learngene")


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.")
    ] = False,
) -> None:
    if version:
        print(f"graphopt {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; a mistake that a message explains shows no traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        known = _find(error)
        if known is None:
            raise
        print_error(str(known))
        sys.exit(2 if isinstance(known, (ConfigError, ModelError)) else 1)


def _find(error: BaseException | None) -> GraphoptError | None:
    """Return the GraphoptError in a chain: Dynamo wraps what a backend raises."""
    while error is not None and not isinstance(error, GraphoptError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error
