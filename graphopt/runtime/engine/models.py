"""What an engine takes over from a transformers model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from graphopt.runtime.engine.batch import Executor
from graphopt.runtime.engine.options import EngineOptions


def for_model(options: EngineOptions, model: nn.Module) -> EngineOptions:
    """Return the options with the model's end tokens and length where none are set."""
    given: Any = model
    ends = getattr(given.generation_config, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    longest = getattr(given.config.get_text_config(), "max_position_embeddings", None)
    return replace(
        options,
        eos_token_ids=options.eos_token_ids or tuple(ends),
        max_length=options.max_length or longest,
    )


def compiled_executor(
    model: nn.Module, config: Any, options: EngineOptions, pages: int
) -> Executor:
    """Return what runs the steps of ``model``; imports the compiler only now."""
    from graphopt.runtime.engine.compiled import CompiledExecutor

    return CompiledExecutor(
        model,
        pages,
        config=config,
        rows=options.max_running,
        max_length=options.max_length,
    )
