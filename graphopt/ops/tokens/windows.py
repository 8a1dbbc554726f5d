"""``graphopt::alike_windows`` and ``graphopt::merge_windows``: MustDrop's first stage.

MustDrop (Liu et al. 2024): the grid of an image's patches is cut into 3 x 3 windows,
and the patches of a window that are alike become one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "alike_windows(Tensor x, int height, int width, int count, float least) -> Tensor"
)
_library.define(
    "merge_windows(Tensor x, Tensor windows, int height, int width) -> Tensor"
)
_library.define("merged_away(Tensor windows, int height, int width) -> Tensor")
SIDE = 3  # patches of a window, each way


def alike_windows(
    x: Tensor, height: int, width: int, count: int, least: float
) -> Tensor:
    """Return the windows of each image that are most alike, bool [N, W].

    x [N, height * width, C] are the patches' vectors, row by row. A window's value is
    the mean cosine of two of its nine patches; the earlier of equals. All images have
    equally many: ``count``, or fewer where an image has fewer of at least ``least``.
    Rows and columns that fill no window belong to none.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    unit = torch.nn.functional.normalize(_windows(x.to(wide), height, width), dim=-1)
    patches = SIDE * SIDE
    # The sum over all pairs is the squared norm of the sum; a patch with itself is 1.
    pairs = unit.sum(2).square().sum(-1) - unit.square().sum((-1, -2))
    alike = pairs / (patches * (patches - 1))
    order = torch.sort(alike, dim=1, descending=True, stable=True).indices
    allowed = (alike >= least).sum(1).amin().clamp(max=count)
    first = torch.arange(alike.shape[1], device=x.device) < allowed
    chosen = torch.zeros_like(alike, dtype=torch.bool)
    return chosen.scatter(1, order, first.expand_as(order))


def merge_windows(x: Tensor, windows: Tensor, height: int, width: int) -> Tensor:
    """Return x [N, P, C] with the mean of each chosen window in its middle patch."""
    middle = _middle(height, width, x.device)
    mean = _windows(x, height, width).mean(2)
    merged = torch.where(windows[:, :, None], mean, x[:, middle])
    return x.index_copy(1, middle, merged)


def merged_away(windows: Tensor, height: int, width: int) -> Tensor:
    """Return the patches of chosen windows but for the middle ones, bool [N, P]."""
    places = torch.arange(height * width, device=windows.device)
    cells = _windows(places[None, :, None], height, width)[0, :, :, 0]  # [W, 9]
    gone = torch.zeros(
        windows.shape[0], height * width, dtype=torch.bool, device=windows.device
    )
    chosen = windows[:, :, None].expand(-1, -1, cells.shape[1]).flatten(1)
    gone = gone.index_copy(1, cells.flatten(), chosen)
    middle = _middle(height, width, windows.device)
    return gone.index_fill(1, middle, False)


def _windows(x: Tensor, height: int, width: int) -> Tensor:
    """Return x [N, P, C] by windows, [N, W, 9, C]."""
    rows, columns = height // SIDE, width // SIDE
    grid = x.unflatten(1, (height, width))[:, : rows * SIDE, : columns * SIDE]
    cut = grid.unflatten(1, (rows, SIDE)).unflatten(3, (columns, SIDE))
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _middle(height: int, width: int, device: torch.device) -> Tensor:
    """Return the place of each window's middle patch, int64 [W]."""
    places = torch.arange(height * width, device=device)[None, :, None]
    return _windows(places, height, width)[0, :, SIDE * SIDE // 2, 0]


_composite = "CompositeImplicitAutograd"
torch.library.impl(_library, "alike_windows", _composite)(alike_windows)
torch.library.impl(_library, "merge_windows", _composite)(merge_windows)
torch.library.impl(_library, "merged_away", _composite)(merged_away)
