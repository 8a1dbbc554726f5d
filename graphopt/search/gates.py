"""Which KV heads need far tokens: DuoAttention's gates, trained on passkeys.

A gate that can fall without changing the last hidden states belongs to a head that
does as well with the first and the nearest tokens alone (Xiao et al. 2024, section
2.2): loss = mean squared difference of the hidden states at the positions that predict
the answer + 0.05 * mean |alpha|. Only gates are trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cache import write_atomic
from graphopt.errors import ModelError
from graphopt.search.gated import Gates, gated
from graphopt.search.keys import Samples
from graphopt.search.partial import Partial, Say, threads_and_versions
from graphopt.search.texts import Text

_STATE = "state"


@dataclass(frozen=True)
class GateSettings:
    """Sizes of a training; ``sink`` and ``recent`` are a streaming head's, in tokens.

    They are those with which the pass deploys such heads. ``rate`` warms up over the
    first fifth of the steps and decays to a tenth over the last.
    """

    steps: int = 100
    context: int = 1024
    batch: int = 1
    seed: int = 0
    sink: int = 64
    recent: int = 256
    keys: int = 5
    rate: float = 0.02
    sparsity_weight: float = 0.05


@dataclass
class GateTraining:
    """Trains the gates of ``model`` on texts of ``text_ids``; ``partial`` resumes."""

    model: Any
    tokenizer: Any
    text_ids: list[int]
    settings: GateSettings
    partial: Partial
    say: Say = lambda what, done, of: None

    def run(self) -> tuple[Tensor, list[float]]:
        """Return (gates [layers, KV heads], loss of each step).

        Raises ModelError for models whose attention is not plain causal, ConfigError
        for a context that leaves no room.
        """
        given = self.settings
        gates = self._gates()
        optimiser = torch.optim.AdamW([gates.alpha], lr=given.rate, weight_decay=0.0)
        losses = self._resumed(gates, optimiser)
        with gated(self.model, gates):
            for step in range(len(losses), given.steps):
                self.say(_progress(losses, gates), step, given.steps)
                losses.append(self._step(gates, optimiser, step))
                self._keep(gates, optimiser, losses)
        return gates.alpha.detach(), losses

    def _gates(self) -> Gates:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None)
        heads = heads or config.num_attention_heads
        sizes = (self.settings.sink, self.settings.recent)
        return Gates(config.num_hidden_layers, heads, *sizes)

    def _step(self, gates: Gates, optimiser: torch.optim.Optimizer, step: int) -> float:
        given = self.settings
        for group in optimiser.param_groups:
            group["lr"] = given.rate * rate_share(step, given.steps)
        optimiser.zero_grad()
        total = 0.0
        for index in range(given.batch):
            ids, answer = self._samples().draw(f"{given.seed}-{step}-{index}")
            loss = self._distance(gates, ids, answer) / given.batch
            loss.backward()
            total += float(loss.detach())
        sparsity = given.sparsity_weight * gates.alpha.abs().mean()
        sparsity.backward()
        optimiser.step()
        with torch.no_grad():
            gates.alpha.clamp_(0.0, 1.0)
        return total + float(sparsity.detach())

    def _samples(self) -> Samples:
        given = self.settings
        sizes = (given.context, given.keys, given.recent)
        return Samples(self.tokenizer, self.text_ids, *sizes)

    def _distance(self, gates: Gates, ids: Tensor, answer: int) -> Tensor:
        gates.mixed = False
        with torch.no_grad():
            full = self._hidden(ids, answer)
        gates.mixed = True
        return (self._hidden(ids, answer) - full).square().mean()

    def _hidden(self, ids: Tensor, answer: int) -> Tensor:
        """Return the last hidden states [answer, D] that predict the answer."""
        output = self.model.base_model(ids, use_cache=False)
        if getattr(output, "last_hidden_state", None) is None:
            raise ModelError(f"{type(self.model).__name__} gives no last_hidden_state")
        return output.last_hidden_state[0, -answer - 1 : -1]

    def _keep(
        self, gates: Gates, optimiser: torch.optim.AdamW, losses: list[float]
    ) -> None:
        moments = optimiser.state[gates.alpha]
        state = {
            "alpha": gates.alpha.tolist(),
            "exp_avg": moments["exp_avg"].tolist(),
            "exp_avg_sq": moments["exp_avg_sq"].tolist(),
            "losses": losses,
        }
        self.partial.keep(_STATE, state)

    def _resumed(self, gates: Gates, optimiser: torch.optim.AdamW) -> list[float]:
        """Take up an earlier run's gates and moments; return its losses."""
        state = self.partial.parts.get(_STATE)
        if state is None:
            return []
        with torch.no_grad():
            gates.alpha.copy_(torch.tensor(state["alpha"]))
        losses = list(state["losses"])
        optimiser.state[gates.alpha] = {
            "step": torch.tensor(float(len(losses))),
            **{k: torch.tensor(state[k]) for k in ("exp_avg", "exp_avg_sq")},
        }
        return losses


def rate_share(step: int, steps: int) -> float:
    """Return the share of the rate at ``step``: a fifth up, a fifth down to a tenth."""
    fifth = max(steps // 5, 1)
    up, down = (step + 1) / fifth, (steps - step) / fifth
    return min(1.0, up, max(down, 0.1))


def _progress(losses: list[float], gates: Gates) -> str:
    mean = float(gates.alpha.detach().mean())
    return f"loss {losses[-1]:.4f}, mean gate {mean:.2f}" if losses else "first step"


def gates_text(gates: Tensor) -> str:
    """Return DuoAttention's TSV: a row a layer, a column a KV head."""
    rows = ("\t".join(f"{gate:.4f}" for gate in row) for row in gates.tolist())
    return "\n".join(rows) + "\n"


def find_gates(
    loaded: Any, text: Text, settings: GateSettings, out: Path, say: Say
) -> tuple[Tensor, list[float]]:
    """Train the gates of a loaded model and write them to ``out``.

    Returns (gates, losses); a run that was cut off is taken up from ``out``.partial.
    """
    known = {"model": loaded.name, "text": text.digest, **asdict(settings)}
    known |= threads_and_versions()
    partial = Partial(out.with_name(out.name + ".partial"), known)
    ids = text.ids(loaded.tokenizer)
    training = GateTraining(loaded.model, loaded.tokenizer, ids, settings, partial, say)
    gates, losses = training.run()
    write_atomic(out, gates_text(gates).encode())
    partial.remove()
    return gates, losses
