"""What models are trained and measured on: tensors, or excerpts of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from graphopt.errors import ConfigError


@dataclass(frozen=True)
class Examples:
    """``inputs``: the model's inputs by name, each [N, ...]; ``labels``: [N], or None.

    Without labels ``input_ids`` [N, S] label themselves: each token is predicted from
    those before it.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.inputs.items()}
        if self.labels is not None:
            sizes["labels"] = len(self.labels)
        if len(set(sizes.values())) != 1 or not self.inputs or not len(self):
            raise ConfigError(f"examples: every tensor needs as many rows; got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def digest(self) -> str:
        """Return a short hash that tells sets of examples apart."""
        found = hashlib.sha256()
        tensors = [*sorted(self.inputs.items()), ("labels", self.labels)]
        for name, value in tensors:
            found.update(name.encode())
            if value is not None:
                found.update(f"{value.dtype}{tuple(value.shape)}".encode())
                plain = value.contiguous().view(-1).view(torch.uint8)
                found.update(plain.numpy().tobytes())
        return found.hexdigest()[:16]

    def rows(self, index: Tensor, device: Any) -> Examples:
        """Return the examples of ``index`` on ``device``."""
        inputs = {name: value[index].to(device) for name, value in self.inputs.items()}
        labels = None if self.labels is None else self.labels[index].to(device)
        return Examples(inputs, labels)

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the order of an epoch, drawn from both numbers alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(self), generator=generator)

    def batches(self, size: int, device: Any) -> Iterator[Examples]:
        """Yield all examples in order, ``size`` at a time."""
        for index in torch.arange(len(self)).split(size):
            yield self.rows(index, device)

    def scored(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the loss is of: logits [rows, C] and their labels [rows].

        A batch's logits [B, C] come with its labels, or with None; those of tokens
        [B, S, V] with the next tokens, where the attention mask has these.
        """
        if self.labels is not None:
            return logits.flatten(0, -2), self.labels.flatten()
        ids = self.inputs.get("input_ids")
        if ids is None or logits.dim() != 3:
            return logits.flatten(0, -2), None
        rows, wanted = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        mask = self.inputs.get("attention_mask")
        if mask is None:
            return rows, wanted
        there = mask[:, 1:].flatten().bool()
        return rows[there], wanted[there]


def read_examples(path: str | Path) -> Examples:
    """Read a safetensors file of the model's inputs by name, and ``labels``.

    Raises ConfigError for one that cannot be read or whose tensors differ in rows.
    """
    try:
        found = load_file(path)
    except Exception as error:
        raise ConfigError(
            f"--data {path}: cannot be read as safetensors ({error}); a text for a "
            "decoder is given with --text"
        ) from None
    labels = found.pop("labels", None)
    return Examples(found, None if labels is None else labels.long())


def text_examples(ids: list[int], tokens: int) -> Examples:
    """Cut a text's token ids into excerpts of ``tokens``; what is left over goes."""
    count = len(ids) // tokens
    if not count:
        raise ConfigError(f"the text has {len(ids)} tokens, an excerpt {tokens}")
    return Examples({"input_ids": torch.tensor(ids[: count * tokens]).view(count, -1)})
