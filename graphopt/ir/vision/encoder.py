"""Find the encoder of the images, its class token and its grid of patches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphopt.ir.attention.site import AttentionSite, find_attention
from graphopt.ir.match import op_name, shape_of
from graphopt.ir.vision.span import VisionSpan, VisionWrite

_IMAGE_AXES = 4  # images, channels, height, width
_PATCH_AXES = 3  # images, patches, channels
_ELSEWHERE = (
    "the images' encoder is in another graph: `generate` runs it before the prefill, a "
    "call of the model with pixel_values has it in the graph"
)


@dataclass(frozen=True)
class VisionEncoder:
    """The encoder behind a write: tokens are a class token, then ``grid`` row by row.

    ``attention`` are the sites that the features depend on, in graph order (a layer
    behind them is dead code, and may be gone); ``selected`` [N, P, C] are the patches'
    vectors that the language model gets, before the projection to its width.
    """

    attention: tuple[AttentionSite, ...]
    selected: fx.Node
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        """Return the number of patches of an image."""
        return self.grid[0] * self.grid[1]


def find_encoder(
    gm: fx.GraphModule, span: VisionSpan
) -> tuple[VisionEncoder | None, str]:
    """Return the encoder, or None and the reason why its class token is of no use."""
    if len(span.writes) != 1:
        return None, "several kinds of features are written into the prompt"
    write = span.writes[0]
    behind = _ancestors(write.features)
    sites = [s for s in find_attention(gm) if s.node in behind]
    if not sites:
        return None, _ELSEWHERE
    grid = _grid(behind)
    if grid is None:
        return None, "no convolution cuts the images into a grid of patches"
    patches = grid[0] * grid[1]
    tokens = {s.query_len for s in sites} | {s.kv_len for s in sites}
    if tokens != {patches + 1} or not _class_first(behind, patches):
        return None, "the encoder has no class token before its patches"
    selected = _selected(write, behind, patches)
    if selected is None:
        return None, "the patches' vectors are not one slice behind the class token"
    return VisionEncoder(tuple(sites), selected, grid), ""


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, pending = {node}, [node]
    while pending:
        fresh = [n for n in pending.pop().all_input_nodes if n not in found]
        found.update(fresh)
        pending += fresh
    return found


def _grid(behind: set[fx.Node]) -> tuple[int, int] | None:
    """Return the height and width of the only convolution's result."""
    shapes = [
        shape_of(node) or ()
        for node in behind
        if op_name(node) in ("conv2d", "convolution")
    ]
    if len(shapes) != 1 or len(shapes[0]) != _IMAGE_AXES:
        return None
    height, width = shapes[0][2:]
    known = isinstance(height, int) and isinstance(width, int)
    return (height, width) if known else None


def _class_first(behind: set[fx.Node], patches: int) -> bool:
    """Tell whether one token is put before the patches, the same for all images."""
    for node in behind:
        parts = node.args[0] if op_name(node) == "cat" and node.args else ()
        if not isinstance(parts, (list, tuple)) or len(parts) != 2:
            continue
        sizes = [shape_of(p) or () for p in parts]
        if all(len(s) == _PATCH_AXES for s in sizes):
            counts = [s[1] for s in sizes]
            if counts == [1, patches]:
                return True
    return False


def _selected(write: VisionWrite, behind: set[fx.Node], patches: int) -> fx.Node | None:
    """Return the slice [N, P, C] of [N, 1 + P, C] from which the features come."""
    found = [
        node
        for node in behind
        if op_name(node) in ("getitem", "slice", "narrow")
        and len(shape_of(node) or ()) == _PATCH_AXES
        and (shape_of(node) or ())[1] == patches
        and isinstance(source := node.args[0], fx.Node)
        and len(shape_of(source) or ()) == _PATCH_AXES
        and (shape_of(source) or ())[1] == patches + 1
    ]
    return found[0] if len(found) == 1 else None
