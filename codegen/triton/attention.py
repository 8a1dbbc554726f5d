"""Run attention on Triton: emit the kernel of a spec, import it, launch it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import Thread
from types import ModuleType

import torch

from graphopt.codegen.cache import load_python
from graphopt.codegen.triton.emit import emit
from graphopt.codegen.triton.interpreter import is_interpreted, repair_bfloat16_dot
from graphopt.codegen.triton.spec import DTYPES, AttentionSpec
from graphopt.codegen.triton.tune import choose_tile
from graphopt.errors import KernelError


def supports(dtype: torch.dtype) -> bool:
    """Tell whether the kernel takes ``dtype``."""
    return dtype in DTYPES


@cache
def load(spec: AttentionSpec) -> ModuleType:
    """Write the kernel's file to the cache directory and import it."""
    if is_interpreted():
        repair_bfloat16_dot()
    return load_python(spec.name, emit(spec))


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_offset: int,
    scale: float | None,
    softcap: float,
) -> torch.Tensor:
    """Run the kernel; shapes and arguments as `graphopt.ops.attention`.

    Returns a contiguous [B, Hq, Sq, Dv]. Any strides of the inputs will do. CPU tensors
    need Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported).
    Raises KernelError for a dtype or a device that has no kernel.
    """
    require_runnable(query)
    spec = attention_spec(query, key, value, key_mask, pattern, (sink, window), softcap)
    batch, num_heads, query_len, head_dim = query.shape
    out = query.new_empty((batch, num_heads, query_len, value.shape[-1]))
    if out.numel() == 0:
        return out
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0:
        # The kernel takes the row's maximum before it scales.
        query, scale = query * scale, 1.0
    arguments: list[object] = [
        query,
        key,
        value,
        *([] if key_mask is None else [key_mask]),
        out,
    ]
    given = {"sink": sink, "window": window}
    arguments += [table_argument(spec, given[name], query) for name in spec.parameters]
    arguments += [query_offset, scale, *([softcap] if softcap else [])]
    run(spec, arguments, query, key.shape[2])
    return out


def run(
    spec: AttentionSpec, arguments: list[object], query: torch.Tensor, kv_len: int
) -> None:
    """Launch the kernel of ``spec`` with the tile that suits its device and lengths."""
    kernel = load(spec).launch
    with torch.cuda.device_of(query):
        tile = choose_tile(spec, kernel, arguments, query, kv_len)
        kernel(*arguments, tile.block_m, tile.block_n, **tile.options())


def attention_spec(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    pattern: str,
    tables: Sequence[Sequence[int]],
    softcap: float,
) -> AttentionSpec:
    """Return the spec of a call; ``tables`` hold one value, or one a head."""
    return AttentionSpec(
        pattern=pattern,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        group=query.shape[1] // key.shape[1],
        has_key_mask=key_mask is not None,
        has_softcap=softcap != 0,
        per_head=any(len(set(table)) > 1 for table in tables),
    )


def table_argument(
    spec: AttentionSpec, table: Sequence[int], query: torch.Tensor
) -> int | torch.Tensor:
    """Return one number where all heads agree, else the table on the device."""
    if not spec.per_head:
        return table[0]
    heads = query.shape[1]
    return on_device(tuple((list(table) * heads)[:heads]), query.device)


@cache
def on_device(table: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return ``table`` as an int32 tensor that lives as long as the process.

    It is made on a thread of its own: CUDA graphs redirect the allocations of the
    thread that records, and a table in their pool would be overwritten by a replay.
    """
    made: list[torch.Tensor] = []

    def make() -> None:
        made.append(torch.tensor(table, dtype=torch.int32, device=device))

    thread = Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def require_runnable(query: torch.Tensor) -> None:
    """Raise KernelError unless a kernel can run on ``query``'s device."""
    if query.is_cuda or is_interpreted():
        return
    raise KernelError(
        f"the Triton kernel cannot run on {query.device.type} tensors; move them to a "
        "GPU, or set TRITON_INTERPRET=1 before Python starts to interpret the kernel"
    )
