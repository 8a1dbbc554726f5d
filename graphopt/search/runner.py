"""Run a model's captured graph eagerly, rewritten as one configuration after another.

Dynamo captures the prefill once; each configuration is a copy of that graph which the
passes rewrote, run node by node without Inductor. The numbers are those of the compiled
model up to the rounding of fused kernels, and a configuration costs one eager prefill
instead of a compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.backend import rewrite
from graphopt.errors import PassError
from graphopt.ir.copying import copy_module
from graphopt.ir.sizes.inputs import tie_sizes
from graphopt.options import parse_options

Edit = Callable[[fx.GraphModule], None]

# Edited copies that are kept: some MB each for a model of 30 layers.
_KEPT = 8


def configured(config: str | None) -> Edit:
    """Return the edit that a pass config makes; ConfigError for a bad config.

    The edit raises PassError where a pass fails, where an approximate one finds nothing
    to do, or none does: a row of a table must not be the dense model unnoticed.
    """
    options = parse_options({"config": config, "strict": True})

    def edit(gm: fx.GraphModule) -> None:
        report, _ = rewrite(gm, options)
        pipeline = options.config.pipeline
        idle = [
            (item, record)
            for item, record in zip(pipeline, report.records, strict=True)
            if not any(remark.kind == "applied" for remark in record.remarks)
        ]
        if len(idle) == len(pipeline) > 0 or not all(i.exact for i, _ in idle):
            remarks = [r for _, record in idle for r in record.remarks]
            reasons = sorted({r.message for r in remarks if r.kind == "missed"})
            raise PassError(f"{config}: no site was rewritten: {'; '.join(reasons)}")

    return edit


class GraphRunner:
    """Prefills of ``model`` through edited copies of its graph.

    ``keep``: positions at the end whose logits are returned; ``use_cache``: whether the
    prefill keeps keys and values. One runner at a time: the capture starts from a
    Dynamo without memory of other models.
    """

    def __init__(self, model: Any, keep: int = 1, use_cache: bool = True) -> None:
        self.model, self.keep, self.use_cache = model, keep, use_cache
        self._edits: dict[str, Edit] = {}
        self._current = ""
        torch._dynamo.reset()
        self._captured = torch.compile(model, backend=self._capture, dynamic=True)

    def add(self, name: str, edit: Edit) -> None:
        """Name an edit of the graph, or change it; applied when the name next runs."""
        self._edits[name] = edit

    @torch.no_grad()
    def prefill(self, name: str, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return (logits [keep, vocab], key-value cache or None) of ids [1, tokens]."""
        asked = {"use_cache": self.use_cache, "logits_to_keep": self.keep}
        output = self.call(name, input_ids=ids, **asked)
        return output.logits[0, -self.keep :], output.past_key_values

    @torch.no_grad()
    def call(self, name: str, **inputs: Any) -> Any:
        """Return what the model returns for any inputs, run as ``name``."""
        self._current = name
        return self._captured(**inputs)

    def _capture(
        self, gm: fx.GraphModule, inputs: list[Any]
    ) -> Callable[..., tuple[Any, ...]]:
        tie_sizes(gm)  # while Dynamo still takes guards
        versions: dict[str, tuple[Edit, fx.GraphModule]] = {}

        def run(*arguments: Any) -> tuple[Any, ...]:
            edit = self._edits[self._current]
            known = versions.pop(self._current, None)
            if known is None or known[0] is not edit:
                known = (edit, _edited(gm, edit))
            versions[self._current] = known  # the latest stands last
            if len(versions) > _KEPT:
                del versions[next(iter(versions))]
            return known[1](*arguments)

        return run


def _edited(gm: fx.GraphModule, edit: Edit) -> fx.GraphModule:
    copy = copy_module(gm)
    edit(copy)
    copy.recompile()
    return copy
