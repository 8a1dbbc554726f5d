"""The command line in this process: to import torch anew takes four seconds a call."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

from graphopt.cli import main


def graphopt(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    """Call `main` as ``python -m graphopt`` does; what it raises is raised."""
    command, code = ["graphopt", *map(str, arguments)], 0
    out, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())
