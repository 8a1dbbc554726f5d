"""The small vision-language model of the examples is trained, and is what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.tiny_vlm import text
from examples.tiny_vlm.data import CANVAS, CELLS, canvases, draw
from examples.tiny_vlm.digits import Digits, held_out, without
from examples.tiny_vlm.evaluate import accuracy, inputs, predictions
from examples.tiny_vlm.model import WEIGHTS, load
from examples.tiny_vlm.packing import branches, layout


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def shown():
    return canvases(64)


def test_accuracy(model):
    """0.944 of 1000 are right; a sample of 256 scatters by 0.014."""
    assert accuracy(model, canvases(256), batch=32) >= 0.9


def test_short_questions_and_padded_batches_are_answered_alike(model, shown):
    usual = predictions(model, shown, 16)
    for phrasing, padding in (("short", 0), (None, 5)):
        found = predictions(model, shown, 16, phrasing, padding)
        assert (found == usual).float().mean() >= 0.9


def test_padding_changes_nothing(model, shown):
    alone, padded = inputs(shown[:4]), inputs(shown[:4], padding=7)
    with torch.no_grad():
        one, other = (
            model(**some, logits_to_keep=1).logits for some in (alone, padded)
        )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_image_matters(model, shown):
    """Answers follow the canvas: with those of others most are wrong."""
    swapped = torch.roll(shown.pixels, 1, 0)
    strange = type(shown)(swapped, shown.cells, shown.asked)
    assert accuracy(model, strange, 16) < 0.5


def test_weights_are_small():
    sizes = [path.stat().st_size for path in WEIGHTS.iterdir()]
    assert sum(sizes) < 4 << 20


def test_same_seed_same_canvases():
    one, again, other = canvases(8, seed=3), canvases(8, seed=3), canvases(8, seed=4)
    assert torch.equal(one.pixels, again.pixels)
    assert torch.equal(one.asked, again.asked)
    assert not torch.equal(one.pixels, other.pixels)
    assert not torch.equal(one.pixels, canvases(8, seed=3, split="validation").pixels)


def test_no_digit_is_in_both_splits():
    validation, test = held_out("validation"), held_out("test")
    assert len(without(test, validation)) == len(test) == 500
    assert len(without(test, test)) == 0


def test_a_canvas_shows_its_digits_where_it_says():
    ink = Digits(np.full((10, 20, 20), 255, np.uint8), np.arange(10, dtype=np.uint8))
    drawn = draw(ink, 16, np.random.default_rng(0))
    side = CANVAS // CELLS
    windows = drawn.pixels[:, 0].unflatten(1, (CELLS, side)).unflatten(3, (CELLS, side))
    lit = (windows > 0).sum((2, 4)).flatten(1)
    assert torch.equal(lit, (drawn.cells != text.NONE) * 400)
    assert torch.equal(drawn.classes, drawn.cells[torch.arange(16), drawn.asked])


def test_the_tokenizer_is_the_prompts(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    written = text.prompt(text.question(9))
    assert tokenizer(written).input_ids == text.ids(written)
    assert tokenizer.image_token_id == model.config.image_token_id


def test_packed_questions_are_the_prompts(model, shown):
    """Training sees each question as if it were the only one."""
    some = shown[:2]
    asked = torch.stack([some.asked, (some.asked + 5) % 16], 1)
    way = layout(2, "long")
    tokens = torch.cat([way.prefix.expand(2, -1), branches(some.cells, asked)], 1)
    with torch.no_grad():
        packed = model(
            input_ids=tokens,
            pixel_values=some.pixels,
            attention_mask=way.mask,
            position_ids=way.positions,
        ).logits[:, len(way.prefix) + way.branch - 2]
        alone = model(**inputs(some), logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_generates_an_answer_and_ends(model, shown):
    given = inputs(shown[:8], phrasing=None)
    tokens = model.generate(**given, max_new_tokens=3, do_sample=False)
    new = tokens[:, given["input_ids"].shape[1] :]
    assert torch.equal(new[:, 0], predictions(model, shown[:8], 8, phrasing=None))
    assert (new[:, 1] == text.EOS).all()


def test_several_images_and_none(model, shown):
    two = torch.tensor([text.ids(text.prompt(text.question(0), images=2))])
    none = torch.tensor([text.ids(text.prompt(text.question(0), images=0))])
    with torch.no_grad():
        both = model(input_ids=two, pixel_values=shown.pixels[:2]).logits
        bare = model(input_ids=none).logits
    assert both.shape[1] == two.shape[1] and both.isfinite().all()
    assert bare.shape[1] == none.shape[1] and bare.isfinite().all()
