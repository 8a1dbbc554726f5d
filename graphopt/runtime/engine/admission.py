"""What the engine refuses at once, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.runtime.engine.batch import Executor
from graphopt.runtime.engine.options import EngineOptions
from graphopt.runtime.engine.request import RequestError
from graphopt.runtime.engine.sampling import SamplingParams


def checked_prompt(
    prompt: str | Sequence[int],
    params: SamplingParams,
    tokenizer: Any,
    executor: Executor,
    options: EngineOptions,
) -> list[int]:
    """Return the token ids of a prompt that can be served.

    Raises RequestError for one that is empty, is no text or token ids, needs a
    tokenizer that there is not, or can never fit.
    """
    if tokenizer is None and (isinstance(prompt, str) or params.stop):
        what = "a prompt of text" if isinstance(prompt, str) else "stop strings"
        raise RequestError(
            f"{what} cannot be read: the engine has no tokenizer; give it one "
            "(Engine(..., tokenizer=...)), or give token ids"
        )
    if isinstance(prompt, str):
        tokens = list(tokenizer(prompt)["input_ids"])
    else:
        tokens = _token_ids(prompt)
    if not tokens:
        raise RequestError("the prompt is empty; give it at least one token")
    _check_length(len(tokens), params.max_new_tokens, executor, options)
    return tokens


def _token_ids(prompt: Sequence[int]) -> list[int]:
    tokens: Any = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    wrong = [t for t in tokens if not isinstance(t, int) or t < 0]
    if wrong:
        raise RequestError(
            f"the prompt holds {wrong[0]!r}, which is no token id; give one prompt, "
            "as text or as a flat sequence of ids"
        )
    return tokens


def _check_length(
    prompt: int, new: int, executor: Executor, options: EngineOptions
) -> None:
    asked = f"the prompt has {prompt} tokens and max_new_tokens is {new}"
    # The last new token is returned and never run, so no page holds it.
    capacity = executor.pages * executor.page_size
    if prompt + new - 1 > capacity:
        raise RequestError(
            f"{asked}, but all {executor.pages} pages together hold {capacity} "
            "tokens, so it can never run; shorten the prompt, lower max_new_tokens, "
            "or give the engine more pages"
        )
    if options.max_length is not None and prompt + new > options.max_length:
        raise RequestError(
            f"{asked}, together more than the {options.max_length} tokens of "
            "max_length; shorten the prompt or lower max_new_tokens"
        )
