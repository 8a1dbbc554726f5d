"""A weight in int8, what is left of it in float, and where that lies."""

from __future__ import annotations

import mmap
import tempfile
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphopt.codegen.cache import cache_dir
from graphopt.codegen.cpp.shadow import add_shadow
from graphopt.errors import KernelError
from graphopt.ops.int8.codes import MOST


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int8 [N, K], scales float32 [N]) of ``weight`` [N, K], symmetric.

    A row of zeros gets the scale 1.
    """
    scales = row_scales(weight)
    return row_codes(weight, scales), scales


def row_scales(weight: Tensor) -> Tensor:
    """Return the value of one step in each row of ``weight``, float32 [N]."""
    return scales_of(weight.detach().abs().amax(1).float())


def scales_of(most: Tensor) -> Tensor:
    """Return the value of one step where ``most`` is the greatest magnitude."""
    scales = most / MOST
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def row_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """Return ``weight`` [N, K] in steps of ``scales`` [N], int8 in one piece."""
    steps = weight.detach().float() / scales[:, None]
    codes = steps.round_().clamp_(-MOST, MOST).to(torch.int8)
    return codes.contiguous()  # oneDNN reads no strides


def on_file(tensor: Tensor) -> tuple[Tensor, mmap.mmap]:
    """Return ``tensor`` as a private map of a file: memory only for what is touched.

    The map comes with it. The file has no name and goes with the map. Raises
    KernelError where it cannot be written.
    """
    whole = tensor.detach().contiguous()
    try:
        with tempfile.TemporaryFile(dir=cache_dir()) as file:
            file.write(whole.flatten().view(torch.uint8).numpy().data)
            file.flush()
            held = mmap.mmap(
                file.fileno(),
                whole.nbytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
    except (OSError, ValueError) as error:
        raise KernelError(
            f"{whole.nbytes} bytes of float weights cannot be written to "
            f"{cache_dir()} ({error}): free some disk, set GRAPHOPT_CACHE_DIR, or keep "
            "them in memory with weights = 'memory'"
        ) from None
    return torch.frombuffer(held, dtype=whole.dtype).view(whole.shape), held


class ShadowColumns:
    """The float columns of a weight [N, K], read by channel and kept while hot.

    Few channels have most outliers (Xu et al. 2025, section 3.3), so columns that were
    read stay in memory until more than ``room`` of them are there; then all go back to
    the file ``held`` and the hot ones are fetched again. ``fetched`` and ``kept`` count
    the columns that a call read from there and those that were there already.
    """

    def __init__(self, columns: Tensor, room: int, held: mmap.mmap | None) -> None:
        self.columns, self.room, self._held = columns, room, held
        self._hot = np.zeros(columns.shape[0], dtype=bool)
        self._lock = threading.Lock()  # chunks of a prompt may run in threads
        self.fetched = self.kept = 0

    def add(
        self, rows: Tensor, ends: tuple[float, float], limit: int, out: Tensor
    ) -> int:
        """Add the shadow of ``rows`` to ``out``; see `graphopt.codegen.cpp.shadow`."""
        used = torch.zeros(self.columns.shape[0], dtype=torch.uint8)
        found = add_shadow(rows, *ends, self.columns, used, limit, out)
        if found:
            self._count(used.numpy().view(bool))
        return found

    def _count(self, used: npt.NDArray[np.bool_]) -> None:
        with self._lock:
            kept = int(np.count_nonzero(used & self._hot))
            self.kept += kept
            self.fetched += int(np.count_nonzero(used)) - kept
            self._hot |= used
            if self._held is not None and np.count_nonzero(self._hot) > self.room:
                self._held.madvise(mmap.MADV_DONTNEED)
                self._hot[:] = False


class Int8Weight:
    """What is made of a weight [N, K] for products in int8, each when first wanted.

    ``scales`` float32 [N] of its rows, ``zeros`` int64 [N] its zero points.
    ``overflows`` counts the calls that had more outliers than their capacity.
    """

    def __init__(self, weight: Tensor) -> None:
        self.scales = row_scales(weight)
        self.zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        self.columns: ShadowColumns | None = None
        self.overflows = 0
        self.is_on_file = False  # the float weight
        self._codes: Tensor | None = None
        self._packed: Tensor | None = None
        self._lock = threading.Lock()

    def packed(self, weight: Tensor) -> tuple[Tensor, bool]:
        """Return the codes in oneDNN's layout, and whether they were made just now."""
        with self._lock:
            is_new = self._packed is None
            if self._packed is None:
                codes = row_codes(weight, self.scales)
                self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
            return self._packed, is_new

    def codes(self, weight: Tensor) -> tuple[Tensor, bool]:
        """Return the codes as they are, int8 [N, K], and whether they are new."""
        with self._lock:
            is_new = self._codes is None
            if self._codes is None:
                self._codes = row_codes(weight, self.scales)
            return self._codes, is_new

    def columns_of(self, weight: Tensor, room: int, is_on_file: bool) -> ShadowColumns:
        """Return the float columns of ``weight`` [N, K]; made at the first outlier."""
        with self._lock:
            if self.columns is None:
                whole = weight.detach().t().contiguous().float()
                columns, held = on_file(whole) if is_on_file else (whole, None)
                self.columns = ShadowColumns(columns, room, held)
            return self.columns

    def count_overflow(self) -> None:
        """Count a call that was made in float."""
        with self._lock:
            self.overflows += 1

    def statistics(self) -> dict[str, Any]:
        """Return counts of fetched and kept columns and of overflows."""
        held = self.columns
        counts = (held.fetched, held.kept) if held else (0, 0)
        names = ("fetched", "kept", "overflows")
        return dict(zip(names, (*counts, self.overflows), strict=True))
