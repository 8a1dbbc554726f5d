"""What ``--tp`` and ``--pp`` ask for, and whether it can be had."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from graphopt.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """How a model lies on ranks: ``tp`` share each layer, ``pp`` stages follow.

    ``limit``: seconds that ranks wait for one another.
    """

    tp: int
    pp: int
    limit: float

    @property
    def ranks(self) -> int:
        """Return how many processes hold the model."""
        return self.tp * self.pp

    @property
    def prints(self) -> bool:
        """Tell whether this process prints: one of them, rank 0."""
        return self.ranks == 1 or os.environ.get("RANK", "0") == "0"

    def check(self, ensemble: bool, stdin: bool) -> None:
        """Raise ConfigError unless torchrun started as many processes as are needed."""
        known = "RANK" in os.environ
        started = int(os.environ.get("WORLD_SIZE", "1")) if known else 1
        if started != self.ranks:
            asked = f"--tp {self.tp} --pp {self.pp}: {self.ranks} process(es) hold this"
            raise ConfigError(
                f"{asked} model and {started} run; start them with: {self._command()}"
            )
        if self.ranks > 1 and ensemble:
            raise ConfigError("--tp, --pp: an ensemble runs in one process")
        if self.ranks > 1 and stdin:
            raise ConfigError(
                "--prompt-file -: ranks share no stdin; give --prompt or a file"
            )

    def _command(self) -> str:
        given = shlex.join(sys.argv[1:])
        if self.ranks == 1:
            return f"graphopt {given}"
        return f"torchrun --nproc-per-node {self.ranks} -m graphopt {given}"


def check_heads(config: Any, tp: int) -> None:
    """Raise ConfigError where ranks would get parts of heads."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", tp)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % tp or kv_heads % tp:
        fits = [n for n in range(1, kv_heads + 1) if not heads % n and not kv_heads % n]
        raise ConfigError(
            f"--tp {tp}: {heads} heads and {kv_heads} KV heads cannot be shared out "
            f"evenly; use --tp {' or '.join(map(str, fits))}"
        )
