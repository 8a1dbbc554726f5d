"""The up-scaling example: texts apart from one another, and what it reports."""

from __future__ import annotations

import pytest
import torch

from examples.eft.data import texts
from examples.eft.train import loss_of, model, train
from examples.eft.upscale import report


@pytest.fixture(scope="module")
def found():
    return texts()


def as_bytes(ids):
    return bytes(ids.flatten().tolist())


def test_what_is_judged_was_in_no_training(found):
    general, task = found["general"], found["task"]
    trained = as_bytes(general.train) + as_bytes(task.train)
    blocks = torch.cat([task.test, task.validation])
    pieces = blocks[:, :1000].reshape(-1, 200)
    # The heads of two tables are alike.
    assert sum(as_bytes(piece) in trained for piece in pieces) <= 1
    assert len(general.train) > 10 * len(task.train)


def test_a_trio_is_judged(found):
    text = found["task"]
    small, large, tuned = model(32, 1, 0), model(64, 1, 0), model(32, 1, 0)
    before = loss_of(tuned, text.test[:2])
    train(tuned, text.train, 6, 3e-3, 0, "tuned")
    few = type(text)(text.train, text.validation[:2], text.test[:2])
    models = {"small": small.eval(), "large": large.eval(), "small-tuned": tuned}
    result = report(models, few, few)
    losses = result["task_test_loss"]
    assert losses["small-tuned"] < before
    (alone,) = (row["test"] for row in result["sweep"] if row["beta"] == 0.0)
    torch.testing.assert_close(alone, losses["large"], atol=1e-5, rtol=0)
    ensemble, sides = losses["ensemble, beta 1"], ("large", "small-tuned")
    assert result["beats_both"] == (ensemble < min(losses[name] for name in sides))
