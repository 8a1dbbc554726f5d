"""Passes, attention and small models at once, on two ranks, prompts in chunks."""

from __future__ import annotations

import torch

import graphopt
from graphopt.calibration import Calibration
from graphopt.calibration.observe import calibrate
from graphopt.models import load
from tests.vllm import reference
from tests.vllm.running import generate
from tests.vllm.tiny import save

PROMPTS = [list(range(1, 91)) * 2, [5, 9, 33, 21]]
TOKENS = 6
SPARSITY = 0.7


def test_all_that_composes(tmp_path):
    folders = [save(tmp_path / "base"), save(tmp_path / "a", 1, 1, 64)]
    folders.append(save(tmp_path / "b", 2, 1, 64))
    base, tuned, other = (load(str(f)).model for f in folders)
    ids = torch.randint(90, (1, 80), generator=torch.Generator().manual_seed(3))
    calibration, _ = calibrate(base, [ids]).write(tmp_path / "calibration")
    read = Calibration.read(calibration)
    at = [read.threshold("gate", name, SPARSITY) for name in sorted(read.gates)]
    reference.close_gates(base, at)
    reference.see_window(base, 4, 24)
    both = graphopt.ensemble(base, tuned, other, 1.5)
    expected = []
    for prompt in PROMPTS:
        base.prompt_len = len(prompt)
        logits_of = lambda ids: both(ids, use_cache=False).logits  # noqa: E731
        expected.append(reference.continued(logits_of, prompt, TOKENS))
    mask = f'method=cats,sparsity={SPARSITY},thresholds="{calibration}",force=true'
    window = "sparse-attention{pattern=a-shape,sink=4,window=24}"
    pair = {
        "tuned": {"model": str(folders[1])},
        "reference": {"model": str(folders[2])},
    }
    settings = {
        "config": f"{window},neuron-mask{{{mask}}}",
        "ensemble": {"beta": 1.5, "pair": [pair]},
    }
    more = {"tensor_parallel_size": 2, "max_num_batched_tokens": 48}
    assert generate(folders[0], settings, PROMPTS, TOKENS, **more) == expected
