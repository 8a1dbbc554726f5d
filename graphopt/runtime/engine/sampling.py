"""How a request's next token is drawn from its logits."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from graphopt.runtime.engine.checked import STRICT, checked

TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingParams:
    """What one request asks for.

    ``max_new_tokens`` end it at the latest. ``temperature`` of 0 takes the likeliest
    token; otherwise the next token is drawn from the smallest set of likeliest tokens
    that holds ``top_p`` of the probability. A request with a ``seed`` draws the tokens
    that ``generate(do_sample=True, top_k=0)`` draws alone after
    ``torch.manual_seed(seed)``, whatever runs beside it. It ends behind one of
    ``stop_token_ids`` or of the model's own end tokens (unless ``ignore_eos``), which
    are not drawn before ``min_new_tokens``; or at one of ``stop`` strings, which its
    text leaves out and which count from the text behind ``min_new_tokens``.

    Raises ConfigError for a value out of range.
    """

    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(strict=False)] = ()
    stop: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _minimum(self) -> SamplingParams:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens, "
                f"{self.max_new_tokens}; lower the one or raise the other"
            )
        return self

    # The last validator is the outermost: it sees the errors of all.
    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: Any, handler: Any) -> Any:
        return checked(cls, values, handler)


class Sampler:
    """Draws the tokens of one request, with a generator of its own."""

    def __init__(self, params: SamplingParams, end_ids: frozenset[int]) -> None:
        self._params = params
        self._end_ids = sorted(end_ids)
        self._generator: torch.Generator | None = None

    def is_argmax(self, drawn: int) -> bool:
        """Tell whether the token behind ``drawn`` ones is the likeliest of all."""
        return self._params.temperature == 0 and not self._barred(drawn)

    def draw(self, logits: Tensor, drawn: int) -> int:
        """Return the next token behind ``drawn`` ones; logits: [V], finite."""
        scores = logits.float()
        if self._barred(drawn):
            scores = scores.clone()
            scores[[i for i in self._end_ids if i < len(scores)]] = -torch.inf
        if self._params.temperature == 0:
            return int(scores.argmax())
        return self._sample(scores / self._params.temperature)

    def _barred(self, drawn: int) -> bool:
        """Tell whether it is too early for the tokens that end the request."""
        return drawn < self._params.min_new_tokens and bool(self._end_ids)

    def _sample(self, scores: Tensor) -> int:
        if self._params.top_p < 1:
            scores = _nucleus(scores, self._params.top_p)
        odds = scores.softmax(-1)
        return int(torch.multinomial(odds, 1, generator=self._seeded(odds.device)))

    def _seeded(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self._params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._params.seed)
        return self._generator


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Return ``scores`` [V], minus infinity outside of the likeliest ``top_p``."""
    ascending, order = scores.sort()
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    outside[-1] = False
    return scores.masked_fill(outside.scatter(0, order, outside), -torch.inf)


def likeliest(logits: Tensor) -> list[int | None]:
    """Return each row's likeliest token, None for logits that are no numbers.

    logits: [N, V]. Waits for the device once for all.
    """
    best, token = logits.max(-1)
    known = torch.where(best.isfinite(), token, -1).tolist()
    return [None if token < 0 else token for token in known]
