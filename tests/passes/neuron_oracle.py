"""CoreInfer in eager models: hooks count a prompt's neurons and zero the others."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from graphopt.codegen.neurons import PARTS
from graphopt.ops.neurons import kept_neurons
from tests.models import TINY
from tests.ops.neurons import counts_by_hand

STACKS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
}


def shallow(name):
    """A model with its first layer alone, which is traced in half the time."""
    model = TINY[name]()
    stack = model.get_submodule(STACKS.get(name, "model.layers"))
    del stack[1:]
    model.requires_grad_(False)
    model.config.get_text_config().num_hidden_layers = 1
    return model


def downs(model):
    """The modules that read the neurons of each layer."""
    found = []
    for name, module in model.named_modules():
        if name.endswith(("mlp.down_proj", ".fc2", "mlp.c_proj")):
            found.append(module)
    return found


class Masked:
    """What the hooks of one model know of one text."""

    def __init__(self, keep=0.4, ratio=0.2, absolute=True, each=False, refresh=0):
        self.keep, self.each, self.refresh = keep, each, refresh
        self.how = (round(ratio * PARTS), absolute)
        self.counts, self.kept, self.steps, self.seen = {}, {}, {}, {}
        self.mask = None  # of the prompt, bool [B, S]

    def hook(self, index):
        def seen(module, args):
            (x,) = args
            rows = x if x.ndim == 3 else x.view(self.mask.shape[0], -1, x.shape[-1])
            if rows.shape[1] > 1:
                start = self.seen.get(index, 0)
                end = self.seen[index] = start + rows.shape[1]
                self.count(index, rows, self.mask[:, start:end], 1)
                return None
            self.steps[index] = self.steps.get(index, 0) + 1
            if self.refresh and self.steps[index] % self.refresh == 0:
                self.count(index, rows, None, self.refresh)
                return None
            return ((rows * self.kept[index][:, None]).view(x.shape),)

        return seen

    def count(self, index, rows, mask, weight):
        number = len(rows) if self.each else 1
        new = counts_by_hand(rows, mask, number, *self.how, weight)
        counts = self.counts[index] = self.counts.get(index, 0) + new
        kept = torch.zeros_like(counts, dtype=torch.bool)
        for row, own in zip(counts.tolist(), kept, strict=True):
            order = sorted(range(len(row)), key=lambda i: (-row[i], i))
            own[order[: kept_neurons(len(row), self.keep)]] = True
        self.kept[index] = kept


@contextmanager
def masked(model, layers, mask, **rule):
    """Within, ``model`` decodes on the neurons of the prompt that runs first."""
    state = Masked(**rule)
    state.mask = mask
    modules = downs(model)
    hooks = [modules[i].register_forward_pre_hook(state.hook(i)) for i in layers]
    try:
        yield state
    finally:
        for hook in hooks:
            hook.remove()


def steps(model, ids, mask, forced, cache, chunk=None):
    """Yield the logits [B, V] behind a prompt and behind each of ``forced`` [B, N].

    ``chunk``: the prompt is given in parts of so many tokens, with logits behind each.
    """
    mask, end = torch.cat((mask.long(), torch.ones_like(forced)), 1), 0
    for new in (*ids.split(chunk or ids.shape[1], 1), *forced.split(1, 1)):
        end += new.shape[1]
        seen = mask[:, :end].contiguous()  # strides of a part would be guarded
        given = {"attention_mask": seen, "past_key_values": cache}
        with torch.no_grad():
            found = model(new, **given, use_cache=True, logits_to_keep=1)
        yield found.logits[:, -1]


def decoded(*given, **chunks):
    """Return the same as one tensor, [B, N + 1, V]."""
    return torch.stack(list(steps(*given, **chunks)), 1)
