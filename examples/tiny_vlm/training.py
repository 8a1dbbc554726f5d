"""The two things that are trained: the tower by itself, then the whole model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from . import text
from .data import CELLS, Canvases
from .model import config
from .packing import Layout, branches

GRID = 3 * CELLS
_SEEN = 0.8
_SIDE_WEIGHT = 0.25


class TowerHeads(nn.Module):
    """Read from the tower what it should see; dropped after the training.

    ``cell``: the class of a cell, from the mean of its patches' features; ``row`` and
    ``column``: where a patch is; ``present``: which digits there are, from the class
    token behind the last layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.Linear(width, len(text.ANSWERS))
        self.row = nn.Linear(width, GRID)
        self.column = nn.Linear(width, GRID)
        self.present = nn.Linear(width, 10)

    def cells(self, features: Tensor) -> Tensor:
        """Return the logits of each cell's class: [N, 16, 11]."""
        return self.cell(pooled_cells(features))

    def loss(self, features: Tensor, pooled: Tensor, cells: Tensor) -> Tensor:
        """Return the mean loss, in nats.

        features: [N, 144, W]; pooled: [N, W]; cells: [N, 16] classes.
        """
        seen = F.cross_entropy(self.cells(features).flatten(0, 1), cells.flatten())
        grid = features.unflatten(1, (GRID, GRID))
        place = torch.arange(GRID).expand(len(cells), GRID, GRID)
        column = F.cross_entropy(self.column(grid).permute(0, 3, 1, 2), place)
        row = F.cross_entropy(self.row(grid).permute(0, 3, 1, 2), place.mT)
        there = F.one_hot(cells, len(text.ANSWERS)).amax(1)[:, : text.NONE].float()
        present = F.binary_cross_entropy_with_logits(self.present(pooled), there)
        return seen + 0.1 * (row + column) + present


def pooled_cells(features: Tensor) -> Tensor:
    """Return the mean of each cell's features: [N, 16, W] of [N, 144, W]."""
    windows = features.unflatten(1, (CELLS, 3, CELLS, 3)).mean((2, 4))
    return windows.flatten(1, 2)


def place_patches(model: LlavaForConditionalGeneration) -> None:
    """Start the tower's position embeddings as sines of a patch's row and column."""
    weight = model.model.vision_tower.embeddings.position_embedding.weight
    quarter = weight.shape[1] // 4
    rates = math.pi / 2 * 2.0 ** -torch.arange(quarter).mul(4 / quarter)
    angles = torch.arange(GRID)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows = line[:, None].expand(-1, GRID, -1)
    columns = line.expand(GRID, -1, -1)
    both = torch.cat([rows, columns], -1).flatten(0, 1)
    with torch.no_grad():
        weight[1:] = both * weight[1:].std() * 2**0.5


def look(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features that LLaVA takes [N, 144, W] and the pooled ones [N, W]."""
    seen = model.model.vision_tower(pixels, output_hidden_states=True)
    layer = model.config.vision_feature_layer
    return seen.hidden_states[layer][:, 1:], seen.pooler_output


def answer_loss(
    model: LlavaForConditionalGeneration,
    heads: TowerHeads,
    canvases: Canvases,
    asked: Tensor,
    layout: Layout,
) -> Tensor:
    """Return the loss of answers and end tokens, and a little of the tower's own.

    asked: [N, Q], the cells asked about. In a coarse layout the decoder sees the means
    of the cells' features.
    """
    features, pooled = look(model, canvases.pixels)
    words = branches(canvases.cells, asked)
    prefix = layout.prefix.expand(len(words), -1)
    tokens = torch.cat([prefix, words], 1)
    embedded = model.get_input_embeddings()(tokens)
    places = (tokens == text.IMAGE)[..., None]
    coarse = int(places[0].sum()) < text.IMAGE_TOKENS
    image = pooled_cells(features) if coarse else features
    image = model.model.multi_modal_projector(image)
    hidden = model.model.language_model(
        inputs_embeds=embedded.masked_scatter(places, image),
        attention_mask=layout.mask,
        position_ids=layout.positions,
        use_cache=False,
    ).last_hidden_state
    ends = hidden[:, prefix.shape[1] :].unflatten(1, (-1, layout.branch))[:, :, -2:]
    answers = words.unflatten(1, (-1, layout.branch))[..., -1]
    targets = torch.stack([answers, torch.full_like(answers, text.EOS)], -1)
    loss = F.cross_entropy(model.lm_head(ends).flatten(0, 2), targets.flatten())
    return loss + _SIDE_WEIGHT * heads.loss(features, pooled, canvases.cells)


def deepen(
    model: LlavaForConditionalGeneration, layers: int
) -> LlavaForConditionalGeneration:
    """Return a model with ``layers`` decoder layers: the stack again and again.

    Stacking a trained shallow model trains a deep one faster than a random start
    (Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking").
    """
    deep = LlavaForConditionalGeneration(config(layers))
    state = model.state_dict()
    few = model.config.text_config.num_hidden_layers
    for name in deep.state_dict():
        if "language_model.layers." in name:
            head, tail = name.split(".layers.")
            index, rest = tail.split(".", 1)
            state[name] = state[f"{head}.layers.{int(index) % few}.{rest}"]
    deep.load_state_dict(state)
    return deep
