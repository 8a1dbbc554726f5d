"""The model of the tensor-parallel tests: whole, and a rank's part of it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def whole(path: str) -> Any:
    """Return the model as one process loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def shared(path: str, how: str) -> Any:
    """Return this rank's part of the model."""
    if how == "torch":
        return parallelized(whole(path))
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=plan).eval()


def parallelized(model: Any) -> Any:
    """Share out the decoder layers of ``model``, in place, and return it."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, Any] = {}
    layers = next(n for n, m in model.named_modules() if hasattr(m, "input_layernorm"))
    stack = layers.rpartition(".")[0]
    for index in range(model.config.get_text_config().num_hidden_layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            plan[f"{stack}.{index}.{name}"] = ColwiseParallel()
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            plan[f"{stack}.{index}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"{stack}.{index}.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)
