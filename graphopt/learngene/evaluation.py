"""How good a model is on examples, and how it is called on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.errors import ConfigError
from graphopt.learngene.examples import Examples


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Examples, batch: int = 256
) -> dict[str, float]:
    """Return ``accuracy`` (share of the best class) and ``loss`` (nats a row)."""
    was_training = model.training
    model.eval()
    right = total = loss = 0.0
    for part in examples.batches(batch, device_of(model)):
        rows, labels = part.scored(logits_of(model, part))
        if labels is None:
            raise ConfigError("evaluate needs labels, or token ids")
        loss += float(F.cross_entropy(rows.float(), labels, reduction="sum"))
        right += float((rows.argmax(-1) == labels).sum())
        total += len(labels)
    model.train(was_training)
    return {"accuracy": right / total, "loss": loss / total}


def logits_of(model: nn.Module, batch: Examples) -> Tensor:
    """Return the logits of a model, whichever way it returns them."""
    decodes = hasattr(model, "config") and "input_ids" in batch.inputs
    options = {"use_cache": False} if decodes else {}
    found = model(**batch.inputs, **options)
    return found if isinstance(found, Tensor) else found.logits


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's parameters are."""
    return next(model.parameters()).device
