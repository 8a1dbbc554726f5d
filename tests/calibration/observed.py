"""Calibrations made eagerly by hooks, in a fraction of the time of a traced one."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.calibration import Calibration, InputStatistics, Magnitudes


def observed(model: torch.nn.Module, ids: torch.Tensor) -> Calibration:
    """Return what the linears and gates of a model are given over ids [1, tokens]."""
    found, hooks = Calibration(), []

    def see_input(name: str, width: int) -> Any:
        held = found.inputs[f"{name}.weight"] = InputStatistics.of_width(width)
        return lambda _, given: held.add(given[0])

    def see_gate(name: str) -> Any:
        held = found.gates[f"{name}.down_proj.weight"] = Magnitudes()
        return lambda _, given, out: held.add(out)

    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("Linear", "Conv1D"):
            width = module.weight.shape[kind == "Linear"]
            hooks.append(module.register_forward_pre_hook(see_input(name, width)))
        if hasattr(module, "act_fn") and hasattr(module, "down_proj"):
            hooks.append(module.act_fn.register_forward_hook(see_gate(name)))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found
