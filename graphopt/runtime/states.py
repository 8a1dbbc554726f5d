"""Hidden states of the tokens that a pass dropped, so that they can come back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphopt.ops.tokens.returning import WHOLE


class HiddenStates:
    """LazyLLM's auxiliary cache (Fu et al. 2024, section 3.3), once for all layers.

    A token that was dropped has keys and values in the layers up to there, and the
    hidden state that left the last of them: one is enough, as it has been computed no
    deeper. ``states`` [B, C, H]; ``depth`` int32 [B, C], the drop behind which a
    token's state lies, or `WHOLE`; ``positions`` int64 [B, C]. C is the room of a row.
    """

    states: Tensor
    depth: Tensor
    positions: Tensor

    @staticmethod
    def like(batch: int, room: int, hidden_size: int, key: Tensor) -> HiddenStates:
        """Return room for the states of tokens with keys like ``key``.

        No constructor takes tensors: see `graphopt.runtime.pool.Pool.like`.
        """
        made = HiddenStates()
        kind, device = key.dtype, key.device
        shape, tokens = (batch, room, hidden_size), (batch, room)
        made.states = torch.zeros(shape, dtype=kind, device=device)
        made.depth = torch.full(tokens, WHOLE, dtype=torch.int32, device=device)
        made.positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        return made

    def hold(self, past: Tensor, new: int) -> None:
        """Count ``new`` tokens from ``past`` int32 [B] on: every layer computes them.

        In a compiled graph this is where `token-drop` finds the tensors.
        """
        torch.ops.graphopt.hold_tokens(*self.tensors(), past, new)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return states, depth and positions."""
        return self.states, self.depth, self.positions

    def grow(self, room: int) -> None:
        """Give every row room for ``room`` tokens."""
        more = room - self.depth.shape[1]
        self.states = pad(self.states, (0, 0, 0, more))
        self.depth = pad(self.depth, (0, more), value=WHOLE)
        self.positions = pad(self.positions, (0, more))

    def select(self, source: Tensor) -> None:
        """Let row b go on as row ``source[b]`` [B'] was."""
        self.states, self.depth, self.positions = (t[source] for t in self.tensors())

    def crop(self, lengths: Tensor) -> None:
        """Forget the tokens of each row from ``lengths`` [B] on."""
        place = torch.arange(self.depth.shape[1], device=self.depth.device)
        self.depth.masked_fill_(place >= lengths[:, None], WHOLE)

    def forget(self) -> None:
        """Forget all tokens."""
        self.depth.fill_(WHOLE)

    def lost(self) -> bool:
        """Tell whether some token is not in every layer."""
        return bool((self.depth != WHOLE).any())
