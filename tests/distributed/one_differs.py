"""``graphopt run`` on each rank, of which rank 1 is not as it should be.

The first argument says how, the rest is the command's: ``differs`` in version, model
and config, ``dies`` where the model runs, or never comes (``hangs``).
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

import graphopt
from graphopt.cli import main, side

RANK = int(os.environ["RANK"])


def differ(arguments: list[str]) -> list[str]:
    """Return the command of another model and config, in another version."""
    graphopt.__version__ = "0.0.9"
    model, other = arguments[1].split(",")
    return ["run", other if RANK else model, *arguments[2:], "-c", "structured-mask"]


def die(*_: Any) -> Any:
    """End as a process does that is killed; the other rank waits for its part."""
    if RANK:
        os._exit(3)
    torch.distributed.all_reduce(torch.ones(1))


def hang(*_: Any) -> Any:
    """Wait for longer than the others do."""
    time.sleep(600)


if __name__ == "__main__":
    how, *arguments = sys.argv[1:]
    if how == "differs" and RANK:
        arguments = differ(arguments)
    elif how == "differs":
        arguments[1] = arguments[1].split(",")[0]
    elif how == "dies":
        side.measure_loaded = die
    elif RANK:
        from graphopt import models

        models.load_config = hang
    sys.argv = ["graphopt", *arguments]
    main()
