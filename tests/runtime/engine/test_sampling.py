"""Tokens are drawn as ``generate`` draws them; wrong values are refused clearly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import ConfigError
from graphopt.runtime import EngineOptions, SamplingParams
from graphopt.runtime.engine.sampling import Sampler, likeliest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": -1},
            "SamplingParams: option 'temperature': Input should be greater than or "
            "equal to 0, not -1",
        ),
        (
            {"top_q": 0.9},
            "SamplingParams: unknown option 'top_q'; did you mean 'top_p'",
        ),
        ({"top_p": 0.0}, "option 'top_p': Input should be greater than 0, not 0.0"),
        ({"max_new_tokens": 0}, "option 'max_new_tokens'"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens is 3, above"),
        ({"stop": "end"}, "option 'stop': Input should be a valid tuple, not 'end'"),
        ({"stop": [""]}, "option 'stop.0': String should have at least 1 character"),
        ({"temperature": float("nan")}, "option 'temperature'"),
    ],
)
def test_wrong_parameters_are_named(options, message):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 100}, "budget, 100 tokens, is no multiple of tile, 128"),
        ({"scheduler": "fifo"}, "option 'scheduler'"),
        ({"max_running": 0}, "option 'max_running'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError) as caught:
        EngineOptions(**options)
    assert message in str(caught.value)


def _draws(params: SamplingParams, logits: torch.Tensor) -> list[int]:
    sampler = Sampler(params, frozenset())
    return [sampler.draw(row, at) for at, row in enumerate(logits)]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    temperature=st.floats(0.1, 3),
    top_p=st.floats(0.05, 1),
)
def test_draws_equal_those_of_the_warpers_of_generate(seed, temperature, top_p):
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(seed % 97)) * 3
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    scores = TopPLogitsWarper(top_p)(
        None, TemperatureLogitsWarper(temperature)(None, logits)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wanted = [int(torch.multinomial(row.softmax(-1), 1)) for row in scores]
    assert _draws(params, logits) == wanted


def test_end_tokens_are_not_drawn_before_the_minimum():
    logits = torch.randn(12)
    end = int(logits.argmax())
    sampler = Sampler(SamplingParams(min_new_tokens=2), frozenset({end, 99}))
    assert not sampler.is_argmax(1)
    assert sampler.draw(logits, 1) == int(logits.topk(2).indices[1])
    assert sampler.is_argmax(2)


def test_unseeded_requests_differ():
    logits = torch.zeros(40, 50)
    params = SamplingParams(temperature=1.0)
    assert _draws(params, logits) != _draws(params, logits)


def test_rows_without_numbers_are_told_apart():
    rows = torch.randn(4, 6)
    rows[1, 3] = torch.nan
    rows[2] = -torch.inf
    wanted = [int(rows[0].argmax()), None, None, int(rows[3].argmax())]
    assert likeliest(rows) == wanted
