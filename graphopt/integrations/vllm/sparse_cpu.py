"""vLLM's attention backend interface over `graphopt::ragged_page_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheLayout

from graphopt import ops as _ops  # noqa: F401  registers the operators
from graphopt.errors import ConfigError
from graphopt.integrations.vllm.heads import LocalHeads, Plan
from graphopt.integrations.vllm.paged import attend, write
from graphopt.integrations.vllm.settings import read_settings
from graphopt.ops.pages import PAGE


@dataclass
class Rows:
    """The step's requests: decodes first. Tensors are int32.

    ``starts`` [R + 1] and ``past`` [R] as in `graphopt.ops.pages.ragged`, ``table``
    [R, M]; the first ``decodes`` rows have one token each.
    """

    starts: Tensor
    past: Tensor
    table: Tensor
    decodes: int
    tokens: int


class SparseMetadataBuilder(AttentionMetadataBuilder[Rows]):
    """Makes `Rows` of what vLLM knows of a step."""

    reorder_batch_threshold = 1  # vLLM then puts decodes first

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        """Arguments are vLLM's."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Rows:
        """Return the step's rows; ConfigError for attention that is not causal."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ConfigError(
                "vLLM: sparse-attention: the model's attention sees ahead"
            )
        decodes, *_ = split_decodes_and_prefills(common, decode_threshold=1)
        starts = common.query_start_loc.int()
        past = common.seq_lens.int() - (starts[1:] - starts[:-1])
        table = common.block_table_tensor.int()
        return Rows(starts, past, table, decodes, common.num_actual_tokens)


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
        return SparseMetadataBuilder


class SparseAttentionImpl(AttentionImpl):
    """One layer's attention: chunks of prompts by the pattern, decodes see all."""

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
            raise ConfigError(f"vLLM: sparse-attention has no {wrong[0]}")
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads, self.scale = num_kv_heads, float(scale)
        self.softcap = float(logits_soft_cap or 0.0)
        self._items = read_settings(get_current_vllm_config()).attention
        self._plan: Plan | None = None

    def plan_of(self, layer: Attention) -> Plan:
        """Return what the heads of ``layer`` on this rank see."""
        if self._plan is None:
            first = get_tensor_model_parallel_rank() * self.num_heads
            group = self.num_heads // self.num_kv_heads
            index = extract_layer_index(layer.layer_name)
            heads = LocalHeads(index, first, self.num_heads, group)
            self._plan = heads.plan(self._items[-1])  # type: ignore[arg-type]
        return self._plan

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
        rows, plan = attn_metadata, self.plan_of(layer)
        how = {"scale": self.scale, "softcap": self.softcap}
        cut = rows.decodes
        parts = ((0, cut, Plan("causal")), (cut, len(rows.past), plan))
        for first, last, pattern in parts:
            if first < last:
                starts = rows.starts[first : last + 1]
                which = (starts, rows.past[first:last], rows.table[first:last])
                attend(output, query, kv_cache, which, pattern, **how)
        return output


def sparse_layers(vllm_config: Any) -> list[str]:
    """Return the names of the layers in which some head does not see everything."""
    layers = vllm_config.compilation_config.static_forward_context.items()
    impls = ((name, x, getattr(x, "impl", None)) for name, x in layers)
    return [
        name
        for name, layer, impl in impls
        if isinstance(impl, SparseAttentionImpl)
        and impl.plan_of(layer).pattern != "causal"
    ]
