"""What the user asks of graphopt inside vLLM, checked by graphopt's own parsers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphopt.config import DEFAULT_FIRST, DEFAULT_LAST, PassConfig
from graphopt.errors import ConfigError
from graphopt.integrations.vllm.fit import ATTENTION, refusal
from graphopt.integrations.vllm.pairs import Pairs, read_pairs
from graphopt.ops.pages import PAGE
from graphopt.options import BackendOptions, parse_options
from graphopt.passes.attention.head_tables import HeadTable
from graphopt.passes.attention.page_selection import PageSelection
from graphopt.passes.attention.sparse_attention import SparseAttention
from graphopt.passes.base import Pass

BACKEND = "graphopt.integrations.vllm.backend"
# The key of vLLM's additional_config, and the variables that name files instead.
KEY = "graphopt"
CONFIG_VARIABLE, PAIRS_VARIABLE = "GRAPHOPT_CONFIG", "GRAPHOPT_ENSEMBLE"


@dataclass(frozen=True)
class Settings:
    """``options`` has the passes over graphs, ``attention`` those of the backend.

    ``pairs`` are the models of logit arithmetic; None without any.
    """

    options: BackendOptions
    attention: tuple[Pass, ...] = ()
    pairs: Pairs | None = None

    @property
    def sparse(self) -> SparseAttention | None:
        """Return what prompts' tokens see; None for everything before them."""
        found = [p for p in self.attention if isinstance(p, SparseAttention)]
        return found[-1] if found else None

    @property
    def pages(self) -> PageSelection | None:
        """Return how decoded tokens choose pages; None where they see all."""
        found = [p for p in self.attention if isinstance(p, PageSelection)]
        return found[-1] if found else None

    @property
    def tables(self) -> list[HeadTable]:
        """Return the tables of heads that attention was given."""
        given = [p.heads_table() for p in (self.sparse, self.pages) if p is not None]
        return [table for table in given if table is not None]


def read_settings(vllm_config: Any) -> Settings:
    """Return what ``vllm_config`` and the environment ask for.

    ``additional_config = {"graphopt": {...}}`` takes the keys of
    `graphopt.options.parse_options` and ``ensemble``, a file's path or its content.
    Raises ConfigError, with the reason, for what cannot be used or cannot be had.
    """
    given = _given(vllm_config)
    pairs = given.pop("ensemble", None)
    given.setdefault("outline", False)  # layers differ by the names of their caches
    options = parse_options(given)
    passes = [p for p in options.config.pipeline if not _is_default(p)]
    for item in passes:
        _check(item, vllm_config)
    over_graphs = tuple(p for p in passes if p.name not in ATTENTION)
    config = PassConfig(over_graphs, options.config.origin)
    return Settings(
        replace(options, config=config),
        tuple(p for p in passes if p.name in ATTENTION),
        None if pairs is None else _pairs(pairs, vllm_config),
    )


def check_backend(settings: Settings, vllm_config: Any) -> None:
    """Raise ConfigError where passes over graphs are asked for and none will come."""
    compilation = vllm_config.compilation_config
    comes = compilation.mode in (1, 2) and compilation.backend == BACKEND
    if settings.options.config.pipeline and not comes:
        names = ", ".join(p.name for p in settings.options.config.pipeline)
        raise ConfigError(
            f"vLLM: {names}: vLLM hands over no graphs; start it with -cc.mode=2 "
            f"-cc.backend={BACKEND}, and without --enforce-eager"
        )


def check_attention(settings: Settings, vllm_config: Any) -> None:
    """Raise ConfigError for a model, a cache or a start that attention cannot have."""
    model, size = vllm_config.model_config, vllm_config.cache_config.block_size
    if size % PAGE:
        raise ConfigError(
            f"vLLM: {settings.attention[0].name}: pages have {PAGE} tokens, and blocks "
            f"of {size} are no multiple; use --block-size {-(-size // PAGE) * PAGE}"
        )
    if settings.pages is not None and vllm_config.kv_transfer_config is not None:
        raise ConfigError(
            "vLLM: page-selection judges keys as they are written, and those that a KV "
            "connector brings are not; drop one of them"
        )
    layers = model.hf_text_config.num_hidden_layers
    heads = model.hf_text_config.num_attention_heads
    for table in settings.tables:
        if wrong := table.mismatch(layers, heads, model.get_total_num_kv_heads()):
            raise ConfigError(f"vLLM: {wrong}; use a table of the model that is served")


def _given(vllm_config: Any) -> dict[str, Any]:
    more = vllm_config.additional_config
    found = more.get(KEY, {}) if isinstance(more, Mapping) else {}
    if not isinstance(found, Mapping):
        raise ConfigError(
            f'additional_config["{KEY}"] is a table such as '
            f'{{"config": "passes.toml"}}, not {found!r}'
        )
    given = dict(found)
    for key, variable in (("config", CONFIG_VARIABLE), ("ensemble", PAIRS_VARIABLE)):
        path = os.environ.get(variable)
        if path and given.get(key) is not None:
            raise ConfigError(
                f'{variable} and additional_config["{KEY}"]["{key}"] both say what to '
                "do; drop one of them"
            )
        if path:
            given[key] = Path(path)
    return given


def _is_default(item: Pass) -> bool:
    """Default passes serve graphs of whole models: masks, and rows that are known."""
    return item.name in (*DEFAULT_FIRST, *DEFAULT_LAST) and not item.options()


def _check(item: Pass, vllm_config: Any) -> None:
    if reason := refusal(item):
        raise ConfigError(f"vLLM: {item.name} cannot be had: {reason}")
    stages = vllm_config.parallel_config.pipeline_parallel_size
    local = item.name not in ATTENTION and getattr(item, "layers", None) is not None
    if stages > 1 and local:
        raise ConfigError(
            f"vLLM: {item.name}: 'layers' counts from the first layer of each of the "
            f"{stages} pipeline stages; leave it out, or use one stage"
        )


def _pairs(given: Any, vllm_config: Any) -> Pairs:
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            "vLLM: 'ensemble' and speculative decoding exclude one another: vLLM runs "
            "no logits processors of others beside a draft model; drop one of them"
        )
    return read_pairs(given, vllm_config.model_config.model)
