"""Runs a step of the engine as one compiled forward of a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.cache_utils import DynamicCache

from graphopt.backend import graphopt, last_reports
from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.ops.pages import PAGE, pages_of
from graphopt.report import CompileReport
from graphopt.runtime.engine.batch import Piece
from graphopt.runtime.engine.ragged_cache import LayerShape, RaggedCache

_LEAST = 3  # of any size that varies: less may be numbers of their own to the compiler


class CompiledExecutor:
    """A pool of ``pages`` pages and a compiled forward over the rows of a step.

    ``model``: a causal language model of transformers. ``config``: passes, as of
    `graphopt.compile`, that run after `ragged-batch`. At most ``rows`` requests of at
    most ``max_length`` tokens run in a step. The model itself stays as it is.

    Raises ConfigError for a model whose attention is not of a kind that rows can share.
    """

    page_size = PAGE

    def __init__(
        self,
        model: nn.Module,
        pages: int,
        *,
        config: Any = None,
        rows: int = 64,
        max_length: int | None = None,
    ) -> None:
        self.pages, self.rows = pages, rows
        self.model = model
        row_pages = min(pages, pages_of(max_length)) if max_length else pages
        weight = next(model.parameters())
        self.cache = RaggedCache(
            layer_shapes(model), pages, rows, row_pages, weight.dtype, weight.device
        )
        self._device = weight.device
        text = "" if config is None else load_config(config).text()
        self._options = {"config": ",".join(filter(None, ("ragged-batch", text)))}
        self._forward: Any = torch.compile(
            Step(model), backend=self._backend, dynamic=True, fullgraph=True
        )
        self.report: CompileReport | None = None
        self._compile()

    def _compile(self) -> None:
        """Compile now: a model that cannot be run is no fault of the first request."""
        try:
            self.run([Piece(0, (0,) * 7, 0, (0,), True)])
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, ConfigError):
                raise error.inner_exception from None
            raise

    def _backend(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled, self.report = lowered(gm, inputs, self._options)
        record = self.report.records[0]
        if not record.changed:
            reasons = "; ".join(str(remark) for remark in record.remarks)
            raise ConfigError(
                f"Engine: {type(self.model).__name__} cannot run batches of rows: "
                f"{reasons}; use the model's own generate"
            )
        return compiled

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Run all pieces in one forward; see `Executor`."""
        if len(pieces) > self.rows:
            raise ValueError(f"{len(pieces)} requests in a step of {self.rows} rows")
        self.cache.place(pieces)
        ids, positions, last = laid_flat(pieces)
        samples = len(last)
        last += [0] * (_LEAST - samples)
        ids, positions = (x + [0] * (_LEAST - len(x)) for x in (ids, positions))
        step = (torch.tensor(x, device=self._device) for x in (ids, positions, last))
        tokens, places, wanted = step
        logits = self._forward(tokens[None], places[None], wanted, self.cache)
        return logits[0, :samples]


def lowered(
    gm: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any]
) -> tuple[Any, CompileReport]:
    """Return the compiled graph, and what was done to it."""
    compiled = graphopt(gm, inputs, options=options)
    return compiled, last_reports()[-1]


class Step(nn.Module):
    """The model as a step calls it; compiled apart from its own forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, last: Tensor, cache: RaggedCache
    ) -> Tensor:
        """Return the logits [1, K, V] of the tokens ``last`` [K] of ids [1, N]."""
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
        logits: Tensor = output.logits
        return logits


def laid_flat(pieces: Sequence[Piece]) -> tuple[list[int], list[int], list[int]]:
    """Return tokens and positions of the row, and where tokens that sample are."""
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    for piece in pieces:
        ids += piece.tokens
        positions += range(piece.past, piece.past + len(piece.tokens))
        if piece.samples:
            last.append(len(ids) - 1)
    return ids, positions, last


@torch.no_grad()
def layer_shapes(model: nn.Module) -> list[LayerShape]:
    """Return what each layer keeps of a token, from a run on two."""
    device = next(model.parameters()).device
    cache = DynamicCache()
    model(torch.zeros((1, 2), dtype=torch.long, device=device), past_key_values=cache)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return [(k.shape[1], k.shape[3], v.shape[3]) for k, v in layers]
