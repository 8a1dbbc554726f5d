"""The objective against its formula, trainings that go on, and the command line."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from graphopt import learngene
from graphopt.cli import app
from graphopt.errors import ConfigError, ModelError
from tests.learngene.models import Plain, made
from tests.models import token_ids


def points(count: int = 40) -> learngene.Examples:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    return learngene.Examples({"x": x}, x[:, :3].argmax(1))


@pytest.mark.parametrize("divide", ["elements", "rows"])
def test_the_objective_is_its_formula(divide):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    labels = torch.randint(7, (5,))
    found = learngene.distillation_loss(
        student, teacher, labels, alpha=0.3, temperature=2.0, divide=divide
    )
    kl = hard = 0.0
    for s, t, label in zip(student.double(), teacher.double(), labels, strict=True):
        q, p = ((v / 2.0).exp() / (v / 2.0).exp().sum() for v in (s, t))
        kl += float((p * (p.log() - q.log())).sum())
        hard -= float(s[label] - s.exp().sum().log())
    divisor = 35 if divide == "elements" else 5
    wanted = 0.7 * hard / 5 + 0.3 * 4.0 * kl / divisor
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_labels_are_not_needed_at_the_papers_alpha():
    logits = torch.randn(3, 4, requires_grad=True)
    teacher = logits.detach().clone()
    loss = learngene.distillation_loss(logits, teacher, None)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-7)


def test_tokens_that_are_padding_are_not_learnt():
    ids, mask = token_ids(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    examples = learngene.Examples({"input_ids": ids, "attention_mask": mask})
    rows, labels = examples.scored(torch.randn(2, 5, 9))
    assert rows.shape == (6, 9)
    assert labels.tolist() == [*ids[0, 1:3].tolist(), *ids[1, 1:].tolist()]


@pytest.mark.parametrize("name", ["vit", "plain"])
def test_a_training_that_was_cut_off_goes_on_bit_for_bit(name, tmp_path):
    teacher, examples = made(name), points()
    if name == "vit":
        torch.manual_seed(0)
        images = {"pixel_values": torch.rand(40, 3, 8, 8)}
        examples = learngene.Examples(images, torch.randint(10, (40,)))
        teacher.config.hidden_dropout_prob = 0.1
    settings = learngene.TrainSettings(
        epochs=2, batch=8, alpha=0.5, warmup=0.5, keep_every=3, rate=1e-2
    )
    students = []
    for stop in (None, 4):
        student = learngene.build(teacher, [2, 2])
        path = tmp_path / f"{stop}.partial"
        arguments = (examples, settings, teacher, path)
        whole = learngene.Training(student, *arguments).run(stop)
        if stop:
            assert len(whole) == 4
            student = learngene.build(teacher, [2, 2])
            whole = learngene.Training(student, *arguments).run()
        assert not path.exists()
        students.append((student, whole))
    (one, losses), (two, others) = students
    assert losses == others
    assert losses[-1] < losses[0]
    assert len(losses) == 10
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "out.partial"
    settings = learngene.TrainSettings(batch=8, alpha=0.0)
    learngene.Training(made("plain"), points(), settings, None, path).run(stop=2)
    with pytest.raises(ConfigError, match="begun with student"):
        learngene.Training(Plain(), points(), settings, None, path).run()
    other = learngene.TrainSettings(batch=8, alpha=0.0, rate=1.0)
    with pytest.raises(ConfigError, match="begun with rate = 0"):
        learngene.Training(Plain(), points(), other, None, path).run()
    with pytest.raises(ConfigError, match="begun with examples"):
        learngene.Training(made("plain"), points(41), settings, None, path).run()
    path.write_bytes(b"half")
    with pytest.raises(ConfigError, match="no checkpoint"):
        learngene.Training(Plain(), points(), settings, None, path).run()


def test_the_rate_warms_up_and_falls_on_a_cosine():
    settings = learngene.TrainSettings(epochs=4, batch=8, warmup=1, alpha=0.0)
    training = learngene.Training(Plain(), points(), settings)
    shares = [training._rate(step) * settings.rate for step in range(21)]
    assert training.steps == 20
    assert shares[0] == pytest.approx(1e-6)
    assert shares[5] == pytest.approx(5e-4)
    half = 1e-5 + 0.5 * (5e-4 - 1e-5) * (1 + math.cos(math.pi / 3))
    assert shares[10] == pytest.approx(half)
    assert shares[20] == pytest.approx(1e-5)


def test_vectors_and_single_rows_do_not_decay():
    training = learngene.Training(
        made("vit"), _pictures(), learngene.TrainSettings(batch=8), made("vit")
    )
    decayed, kept = (g["params"] for g in training._optimiser.param_groups)
    assert all(p.dim() > 1 and len(p) > 1 for p in decayed)
    assert {p.dim() for p in kept} == {1, 3}


def _pictures() -> learngene.Examples:
    torch.manual_seed(0)
    images = {"pixel_values": torch.rand(16, 3, 8, 8)}
    return learngene.Examples(images, torch.randint(10, (16,)))


def test_refusals():
    plain, settings = Plain(), learngene.TrainSettings(batch=8)
    with pytest.raises(ConfigError, match="needs a teacher"):
        learngene.Training(plain, points(), settings)
    with pytest.raises(ConfigError, match="no batch of 8"):
        learngene.Training(plain, points(7), settings, plain)
    bare = learngene.Examples(points().inputs)
    hard = learngene.TrainSettings(batch=8, alpha=0.5)
    with pytest.raises(ConfigError, match="needs labels"):
        learngene.Training(plain, bare, hard, plain).run()
    wide = Plain()
    wide.head = torch.nn.Linear(8, 4)
    with pytest.raises(ModelError, match="gives 4 classes, the student 3"):
        learngene.distil(plain, wide, points(), settings)
    for wrong in ({"alpha": 2}, {"temperature": 0}, {"divide": "batch"}, {"batch": 0}):
        with pytest.raises(ConfigError):
            learngene.TrainSettings(**wrong)
    with pytest.raises(ConfigError, match="as many rows"):
        learngene.Examples({"x": torch.rand(3, 2)}, torch.zeros(2))


def test_the_command_line(tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, ["learngene", *map(str, arguments), "--json"])
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout.splitlines()[-1])

    teacher = made("vit")
    teacher.save_pretrained(tmp_path / "teacher")
    save_file(
        {"pixel_values": torch.rand(16, 3, 8, 8), "labels": torch.randint(10, (16,))},
        tmp_path / "data.safetensors",
    )
    auxiliary, trained, made_of = (tmp_path / n for n in ("aux", "trained", "deep"))
    built = run("build", tmp_path / "teacher", "--count", 2, "--out", auxiliary)
    assert built["stages"] == [2, 2]
    data = ("--data", tmp_path / "data.safetensors", "--batch", 4, "--epochs", 2)
    options = ("--teacher", tmp_path / "teacher", *data, "--out", trained)
    assert run("distil", auxiliary, *options)["steps"] == 8
    assert not (tmp_path / "trained.partial").exists()
    expanded = run("expand", trained, "--map", "0,0,1", "--out", made_of)
    assert expanded["layers"] == 3
    found = learngene.load(made_of)
    assert learngene.plan_of(found) is None
    assert learngene.evaluate(found, _pictures())["loss"] > 0
    both = ["build", str(auxiliary), "--out", str(made_of)]
    result = CliRunner().invoke(app, ["learngene", *both])
    assert "either --stages or --count" in str(result.exception)
