"""The backend that vLLM hands graphs to: vLLM's spellings raised, passes, Inductor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import fx

from graphopt._compat import fake_mode_of
from graphopt.backend import Compiled, compile_rewritten, rewrite
from graphopt.errors import ConfigError, PassError
from graphopt.integrations.vllm.settings import Settings, read_settings
from graphopt.integrations.vllm.spelling import lower, raise_ops
from graphopt.pipeline import PassRecord

Backend = Callable[[fx.GraphModule, list[Any]], Compiled]


def check_platform(settings: Settings) -> None:
    """Raise ConfigError for attention that the platform would not ask for."""
    from vllm.platforms import current_platform

    if settings.attention and not current_platform.is_cpu():
        raise ConfigError(
            f"vLLM: {settings.attention[0].name} is offered on CPUs alone so far; "
            "leave it out"
        )


def make_backend() -> Backend:
    """Return the backend of the model that vLLM is building.

    vLLM would write compiled functions to disk, which those of a backend that is a
    function cannot be (``VLLM_USE_AOT_COMPILE``); Inductor's own cache serves instead.
    Raises ConfigError for settings that cannot be used.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None:
        raise ConfigError(
            "graphopt.integrations.vllm.backend is made where vLLM builds a model: "
            "give its name, -cc.mode=2 -cc.backend=graphopt.integrations.vllm.backend"
        )
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    settings = read_settings(config)
    check_platform(settings)
    _leave_weights(bool(settings.options.config.pipeline))

    def graphopt(gm: fx.GraphModule, inputs: list[Any]) -> Compiled:
        return compile_graph(settings, config, gm, inputs)

    return graphopt


def compile_graph(
    settings: Settings, vllm_config: Any, gm: fx.GraphModule, inputs: list[Any]
) -> Compiled:
    """Rewrite one graph of a worker and compile it.

    Raises PassError for a pass that was asked for and found nothing to do.
    """
    if settings.attention:
        _check_attention(settings, vllm_config)
    pipeline = settings.options.config.pipeline
    raise_ops(gm, split_gates=any(_masks_gates(item) for item in pipeline))
    known = _guards(gm)
    report, original = rewrite(gm, settings.options)
    if new := _guards(gm)[len(known) :]:
        raise PassError(
            f"vLLM: passes rely on sizes ({', '.join(new)}), and one compiled graph "
            "serves all of them: vLLM drops guards"
        )
    lower(gm)
    gm.recompile()
    _check(report.records)
    return compile_rewritten(gm, inputs, settings.options, report, original)


def _check_attention(settings: Settings, vllm_config: Any) -> None:
    from graphopt.integrations.vllm.sparse_cpu import sparse_layers

    stages = vllm_config.parallel_config.pipeline_parallel_size
    if not sparse_layers(vllm_config) and stages == 1:
        raise PassError(
            f"vLLM: {settings.attention[0].name} found no layer: the model attends by "
            "another backend (MLA, encoders), or the options leave every head dense"
        )


def _guards(gm: fx.GraphModule) -> list[str]:
    """Return what is assumed of sizes so far."""
    env = getattr(fake_mode_of(gm), "shape_env", None)
    return [str(guard.expr) for guard in env.guards] if env is not None else []


def _check(records: list[PassRecord]) -> None:
    for record in records:
        if not any(remark.kind == "applied" for remark in record.remarks):
            reasons = "; ".join(dict.fromkeys(str(r) for r in record.remarks))
            raise PassError(f"vLLM: {record.name} rewrote nothing: {reasons}")


def _masks_gates(item: Any) -> bool:
    return item.name == "neuron-mask" and item.options().get("method") == "cats"


def _leave_weights(plain: bool) -> None:
    """Let linears of a CPU stay linears, as on GPUs, where passes read them.

    vLLM packs their weights into handles of oneDNN otherwise, when they are loaded; it
    skips layers with this attribute.
    """
    from vllm.model_executor.layers.linear import LinearBase

    LinearBase._cpu_skip_gemm_dispatch = plain
