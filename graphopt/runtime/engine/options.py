"""How an engine fills its steps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from graphopt.runtime.engine.checked import STRICT, checked
from graphopt.runtime.engine.sampling import TokenId
from graphopt.runtime.engine.schedulers import Limits

Tokens = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineOptions:
    """What bounds the steps; ``budget``, ``tile`` and ``chunk_limit`` in tokens.

    A step of the ``sarathi`` scheduler runs at most ``budget`` tokens, decodes and
    chunks together, a multiple of ``tile`` where it can; the other schedulers, which
    never cut a prompt, run a longer one at once. At most ``max_running`` requests are
    admitted at a time, and one prompt gets at most ``chunk_limit`` tokens of a step in
    which another wants some. ``share_prefixes`` lets requests use the same full pages
    of equal tokens. Requests may have ``max_length`` tokens, prompt and new ones, if
    given. ``eos_token_ids`` are the model's own end tokens.

    Raises ConfigError for a value out of range.
    """

    budget: Tokens = 256
    tile: Tokens = 128
    scheduler: Literal["request-level", "prefill-first", "decode-first", "sarathi"] = (
        "sarathi"
    )
    max_running: Annotated[int, Field(gt=0)] = 64
    chunk_limit: Tokens | None = None
    share_prefixes: bool = True
    max_length: Tokens | None = None
    eos_token_ids: Annotated[tuple[TokenId, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _aligned(self) -> EngineOptions:
        if self.budget % self.tile:
            raise ValueError(
                f"budget, {self.budget} tokens, is no multiple of tile, {self.tile}; "
                "the last tile of a full step would be paid for and not used"
            )
        return self

    # The last validator is the outermost: it sees the errors of all.
    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: Any, handler: Any) -> Any:
        return checked(cls, values, handler)

    def limits(self, page_size: int) -> Limits:
        """Return what a scheduler needs of this, for pages of so many tokens."""
        return Limits(
            self.budget, self.tile, self.max_running, page_size, self.chunk_limit
        )
