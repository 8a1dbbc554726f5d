"""Attention on a CPU: vLLM's paged cache, read by graphopt's kernels.

vLLM asks for `Backend` while it builds a model. Without ``sparse-attention`` or
``page-selection`` in the settings that is vLLM's own. Keys and values lie in
vLLM's blocks, of `PAGE` tokens, as rows of channels: vLLM's kernel has a private order,
so both writing and reading are done here.
"""

from __future__ import annotations

from typing import Any

PATH = f"{__name__}.Backend"


def override() -> None:
    """Let vLLM ask here for its CPU attention."""
    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        register_backend,
    )

    register_backend(AttentionBackendEnum.CPU_ATTN, PATH)


def __getattr__(name: str) -> Any:
    if name != "Backend":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from graphopt.integrations.vllm.settings import (
        check_attention,
        check_backend,
        read_settings,
    )

    config = get_current_vllm_config_or_none()
    if config is None:
        return CPUAttentionBackend
    settings = read_settings(config)
    check_backend(settings, config)
    if not settings.attention:
        return CPUAttentionBackend
    check_attention(settings, config)
    from graphopt.integrations.vllm.sparse_cpu import SparseAttentionBackend

    return SparseAttentionBackend
