"""Which ranks are a stage, and which share the heads and neurons of its layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from graphopt.errors import ConfigError, ModelError
from graphopt.memory import page_out_files


def pipeline_mesh(tp: int, pp: int, device: str = "cpu") -> DeviceMesh:
    """Return the mesh [pp, tp] of all ranks; those of a stage have following numbers.

    Starts the process group where that has not been done (gloo on a CPU, nccl on a
    GPU, of which each rank takes its own). Raises ConfigError for another number of
    processes.
    """
    if device == "cuda":
        torch.cuda.set_device(int(_environment("LOCAL_RANK")))
    if not dist.is_initialized():
        _environment("RANK")
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if dist.get_world_size() != tp * pp:
        raise ConfigError(
            f"tp = {tp} and pp = {pp} are {tp * pp} processes, and there are "
            f"{dist.get_world_size()}: torchrun --nproc-per-node {tp * pp} ..."
        )
    return init_device_mesh(device, (pp, tp), mesh_dim_names=("pp", "tp"))


def _environment(name: str) -> str:
    import os

    if name not in os.environ:
        raise ConfigError(
            f"{name} is not set: start one process for each rank, as with torchrun "
            "--nproc-per-node N ..."
        )
    return os.environ[name]


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank of ``mesh`` its heads and neurons of ``model``, in place.

    By the model's own plan (``base_model_tp_plan``), as transformers applies it when it
    loads under `DistributedConfig(tp_plan="auto")`; that itself refuses to load for a
    pipeline as well, and takes the ranks of all processes for one group. Raises
    ModelError for a model without a plan.
    """
    if mesh.size() == 1:
        return
    # Neither is public: transformers applies plans only while it loads.
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    given: Any = model
    try:
        plans = given._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    except ValueError as error:
        raise ModelError(f"{type(model).__name__}: {error}") from None
    # A sharded embedding keeps which ids it has in the placement of its result, which
    # torch (2.13) shares between calls, those on fake tensors among them. It is read by
    # the first stage alone, so that it stays whole, as does a head that is tied to it.
    whole = _tied(model)
    plan = {
        name: kind
        for name, kind in plans[0].items()
        if "embedding" not in kind and name not in whole
    }
    apply_tensor_parallelism(model, mesh, plan)
    page_out_files(".safetensors")


def _tied(model: nn.Module) -> set[str]:
    """Return the names of parameters that modules share, and of the modules."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {n for found in names.values() if len(found) > 1 for n in found}
    return shared | {name.rpartition(".")[0] for name in shared}
