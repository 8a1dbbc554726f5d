"""A step's cost is recovered from steps; too few kinds of steps are refused."""

from __future__ import annotations

import random

import pytest

from graphopt.errors import GraphoptError
from graphopt.runtime import Engine, EngineOptions, SamplingParams
from graphopt.runtime.engine.simulator import Load, StepCost, TimedExecutor, fit_cost
from tests.runtime.engine.dense_executor import DenseExecutor
from tests.runtime.engine.simulator.published import llama_13b, published_steps

TRUE = StepCost(0.02, 1e-4, 1e-6, 1e-8, tile=128)


def _steps(number: int, noise: float = 0.0) -> list[tuple[list[Load], float]]:
    numbers = random.Random(0)
    steps = []
    for _ in range(number):
        loads = [Load(numbers.randrange(4000), 1) for _ in range(numbers.randrange(40))]
        loads.append(Load(numbers.randrange(4000), numbers.randrange(2, 600)))
        seconds = TRUE.seconds(loads) * (1 + numbers.uniform(-noise, noise))
        steps.append((loads, seconds))
    return steps


def test_tokens_cost_by_tile_and_attention_by_context():
    cost = StepCost(1.0, 0.1, 0.01, 0.001, tile=4)
    loads = [Load(10, 1), Load(5, 1), Load(6, 3)]
    assert cost.seconds(loads) == pytest.approx(1 + 0.8 + 0.15 + 0.001 * (36 + 9))
    assert cost.seconds([Load(0, 5)]) - cost.seconds([Load(0, 4)]) > 0.4


def test_exact_steps_give_the_cost_back():
    fitted = fit_cost(_steps(30), 128)
    for name in ("constant", "per_token", "per_past", "per_pair"):
        assert getattr(fitted, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)


def test_noisy_steps_give_nearly_it_and_the_errors_tell():
    steps = _steps(200, noise=0.1)
    fitted = fit_cost(steps, 128)
    assert fitted.per_token == pytest.approx(TRUE.per_token, rel=0.1)
    errors = sorted(abs(error) for error in fitted.errors(steps))
    assert 0.02 < errors[100] < 0.08


def test_no_weight_is_negative():
    # Longer prompts take less time here: their weight would be below zero.
    steps = [([Load(0, n), Load(9 * n, 1)], 1 - n / 4000) for n in range(100, 900, 50)]
    steps += [([Load(0, n)], 1 - n / 4000) for n in range(100, 900, 50)]
    steps += [([Load(0, 50)] * n, 1 - n / 100) for n in range(1, 9)]
    fitted = fit_cost(steps, 1)
    assert min(fitted.per_token, fitted.per_past, fitted.per_pair) == 0
    assert fitted.constant > 0.5


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "0 measured steps do not tell 'constant'.*measure steps"),
        ([([Load(0, 9)], 1.0)] * 3, "'per_token' from the terms before it.*numbers of"),
        ([([Load(0, 300)], 1.0), ([Load(0, 9)], 0.5)], "'per_past'.*measure decodes"),
    ],
)
def test_steps_that_are_too_alike_are_refused(steps, message):
    with pytest.raises(GraphoptError, match=message):
        fit_cost(steps, 128)


def test_published_steps_fit():
    cost = llama_13b()
    assert max(abs(error) for error in cost.errors(published_steps())) < 0.15
    # A token over a tile costs as the next tile.
    assert cost.seconds([Load(0, 257)]) > 1.2 * cost.seconds([Load(0, 256)])


def test_the_steps_of_an_engine_are_measured():
    ticks = iter(range(1000))
    timed = TimedExecutor(DenseExecutor(8, 16), lambda: float(next(ticks)))
    engine = Engine(timed, options=EngineOptions(budget=16, tile=16))
    engine.submit(list(range(20)), SamplingParams(max_new_tokens=2)).result()
    assert timed.measured == [
        ([Load(0, 16)], 1.0),
        ([Load(16, 4)], 1.0),
        ([Load(20, 1)], 1.0),
    ]
