"""vLLM's attention backend interface over `graphopt::ragged_page_attention`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from graphopt import ops as _ops  # noqa: F401  registers the operators
from graphopt.errors import ConfigError
from graphopt.integrations.vllm.heads import LocalHeads, Plan
from graphopt.integrations.vllm.paged import attend, write
from graphopt.integrations.vllm.selection import Selection
from graphopt.integrations.vllm.settings import read_settings
from graphopt.integrations.vllm.steps import Rows, RowsBuilder
from graphopt.ops.pages import PAGE


class SparseAttentionBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    supported_dtypes: ClassVar = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar = ["auto"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """Return the name of the backend that this one stands in for."""
        return "CPU_ATTN"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Return the page of graphopt's kernels; vLLM cuts its blocks into such."""
        return [PAGE]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return blocks by layer, heads by block: each block is one piece."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Return what computes."""
        return SparseAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """Return what prepares a step."""
        return RowsBuilder


class SparseAttentionImpl(AttentionImpl):
    """One layer's attention: chunks of prompts by the pattern of their heads.

    Decoded tokens see all, or with `page-selection` the pages that matter.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Arguments are vLLM's. Raises ConfigError for what the kernel has not."""
        unknown = {
            "ALiBi": alibi_slopes is not None,
            "a window of the model's own": sliding_window is not None,
            "sink logits": sinks is not None,
            f"attention of the kind '{attn_type}'": attn_type != "decoder",
            f"a cache of {kv_cache_dtype}": kv_cache_dtype != "auto",
        }
        if wrong := [what for what, found in unknown.items() if found]:
            raise ConfigError(f"vLLM: graphopt's attention has no {wrong[0]}")
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads, self.scale = num_kv_heads, float(scale)
        self.softcap = float(logits_soft_cap or 0.0)
        config = get_current_vllm_config()
        self._settings = read_settings(config)
        self._total_kv_heads = config.model_config.get_total_num_kv_heads()
        self._plan: Plan | None = None
        self._selection: Selection | None = None

    def plan_of(self, layer: Attention) -> Plan:
        """Return what prompts' tokens see with the heads of ``layer`` on this rank."""
        if self._plan is None:
            item, heads = self._settings.sparse, self._heads(layer)
            self._plan = Plan("causal") if item is None else heads.plan(item)
        return self._plan

    def selection_of(self, layer: Attention) -> Selection | None:
        """Return how pages are chosen; None where decoded tokens see all."""
        item = self._settings.pages
        if self._selection is None and item is not None:
            self._selection = Selection(item, self._heads(layer).rings(item))
        return self._selection

    def _heads(self, layer: Attention) -> LocalHeads:
        """Return which heads these are; ranks may hold copies of a KV head."""
        ranks = get_tensor_model_parallel_world_size()
        group = self.num_heads * ranks // self._total_kv_heads
        first = get_tensor_model_parallel_rank() * self.num_heads
        index = extract_layer_index(layer.layer_name)
        return LocalHeads(index, first, self.num_heads, group)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        """Write key and value [N, Hkv, D] to the places ``slots`` [N] of the cache."""
        write(kv_cache, key, value, slots)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Rows | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention of query [N, Hq, D] to ``output``, alike, and return it."""
        if attn_metadata is None:  # warming up
            return output
        rows, selection = attn_metadata, self.selection_of(layer)
        how = (self.scale, self.softcap)
        if selection is not None:
            selection.write(kv_cache, rows.parts, rows.reading)
            selection.attend(output, query, kv_cache, rows.decoding, *how)
        elif rows.decodes:
            attend(output, query, kv_cache, rows.decoding, Plan("causal"), *how)
        if rows.decodes < len(rows.past):
            plan = self.plan_of(layer)
            attend(output, query, kv_cache, rows.reading, plan, *how)
        return output


def sparse_layers(vllm_config: Any) -> list[str]:
    """Return the names of the layers in which some token does not see everything."""
    layers = vllm_config.compilation_config.static_forward_context.items()
    impls = ((name, x, getattr(x, "impl", None)) for name, x in layers)
    return [
        name
        for name, layer, impl in impls
        if isinstance(impl, SparseAttentionImpl)
        and (impl.selection_of(layer) or impl.plan_of(layer).pattern != "causal")
    ]
