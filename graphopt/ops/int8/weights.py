"""A weight in int8, what is left of it in float, and where that lies."""

from __future__ import annotations

import mmap
import tempfile
import threading
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cache import cache_dir
from graphopt.errors import KernelError

_MOST = 127.0


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int8 [N, K], scales float32 [N]) of ``weight`` [N, K], symmetric.

    A row of zeros gets the scale 1.
    """
    wide = weight.float()
    scales = wide.abs().amax(1) / _MOST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (wide / scales[:, None]).round_().clamp_(-_MOST, _MOST)
    return codes.to(torch.int8).contiguous(), scales  # oneDNN reads no strides


def on_file(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as a private map of a file: memory only for what is touched.

    The file has no name and goes with the map. Raises KernelError where it cannot be
    written.
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
    return torch.frombuffer(held, dtype=whole.dtype).view(whole.shape)


class ShadowColumns:
    """The float columns of a weight [N, K], fetched by channel and kept while hot.

    Few channels have most outliers (Xu et al. 2025, section 3.3, under 3 %), so those
    that were asked for stay, up to ``room`` of them, the latest longest. ``columns``
    [K, N] holds all; ``fetched`` and ``kept`` count what came from there and what was
    there already.
    """

    def __init__(self, columns: Tensor, room: int) -> None:
        self.columns, self.room = columns, room
        self._hot: dict[int, Tensor] = {}
        self._lock = threading.Lock()  # chunks of a prompt may run in threads
        self.fetched = self.kept = 0

    def take(self, channels: Tensor) -> Tensor:
        """Return the columns [C, N] of ``channels`` int32 [C]."""
        with self._lock:
            return torch.stack([self._one(channel) for channel in channels.tolist()])

    def _one(self, channel: int) -> Tensor:
        found = self._hot.pop(channel, None)
        if found is None:
            self.fetched += 1
            found = self.columns[channel].clone()
            if len(self._hot) >= max(self.room, 1):
                self._hot.pop(next(iter(self._hot)))
        else:
            self.kept += 1
        self._hot[channel] = found
        return found


class Int8Weight:
    """What is made of a weight [N, K] for oneDNN's int8 product.

    ``packed``: the codes in oneDNN's layout, ``scales`` float32 [N] of its rows,
    ``zeros`` int64 [N] its zero points. ``overflows`` counts the calls that had more
    outliers than room.
    """

    def __init__(self, weight: Tensor) -> None:
        codes, self.scales = quantize_weight(weight)
        self.zeros = torch.zeros(codes.shape[0], dtype=torch.int64)
        self.packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
        self.columns: ShadowColumns | None = None
        self.overflows = 0
        self._lock = threading.Lock()

    def columns_of(self, weight: Tensor, room: int, is_on_file: bool) -> ShadowColumns:
        """Return the float columns of ``weight`` [N, K]; made at the first outlier."""
        with self._lock:
            if self.columns is None:
                whole = weight.detach().t().contiguous().float()
                whole = on_file(whole) if is_on_file else whole
                self.columns = ShadowColumns(whole, room)
            return self.columns

    def statistics(self) -> dict[str, Any]:
        """Return counts of fetched and kept columns and of overflows."""
        held = self.columns
        counts = (held.fetched, held.kept) if held else (0, 0)
        names = ("fetched", "kept", "overflows")
        return dict(zip(names, (*counts, self.overflows), strict=True))
