"""Requests in company give what ``generate`` gives alone, under load and faults."""

from __future__ import annotations

import random
import threading
from functools import cache

import pytest
import torch

from graphopt.runtime import Engine, EngineOptions, SamplingParams
from graphopt.runtime.engine import RequestError, State
from tests.runtime.engine.dense_executor import VOCABULARY, DenseExecutor, generated
from tests.runtime.engine.tokenizers import byte_tokenizer
from tests.runtime.engine.watched import WatchedExecutor

SCHEDULERS = ("request-level", "prefill-first", "decode-first", "sarathi")
NEW = 10
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 3}


def _prompt(length: int, seed: int = 0) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCABULARY) for _ in range(length)]


LENGTHS = (1, 5, 30, 33, 70, 16, 17, 48)
PROMPTS = [_prompt(length, seed) for seed, length in enumerate(LENGTHS)]


@cache
def _wanted(index: int, sampled: bool = False) -> list[int]:
    options = {k: v for k, v in SAMPLED.items() if k != "seed"} if sampled else {}
    return generated(
        PROMPTS[index], NEW, SAMPLED["seed"] if sampled else None, **options
    )


def _engine(pages: int = 40, **options: object) -> Engine:
    given = {"budget": 32, "tile": 16, **options}
    return Engine(WatchedExecutor(pages, 16), options=EngineOptions(**given))


def _params(sampled: bool = False, new: int = NEW) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, **(SAMPLED if sampled else {}))


def _finish(engine: Engine) -> None:
    while engine.step():
        engine.check()
    assert engine.free_pages == engine._executor.pages


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("pages", "running"), [(40, 3), (40, 64), (6, 64)])
def test_tokens_are_those_of_generate(scheduler, pages, running):
    engine = _engine(pages, scheduler=scheduler, max_running=running)
    handles = [
        engine.submit(prompt, _params(sampled))
        for prompt in PROMPTS
        for sampled in (False, True)
    ]
    _finish(engine)
    for index in range(len(PROMPTS)):
        assert handles[2 * index].tokens == _wanted(index)
        assert handles[2 * index + 1].tokens == _wanted(index, sampled=True)
    if pages == 6:
        assert sum(step.preempted for step in engine.history) > 0
    if scheduler == "sarathi":
        assert max(step.tokens for step in engine.history) <= 32


@pytest.mark.parametrize("chunk", [1, 63, 64, 129, 130])
def test_chunks_of_any_size(chunk):
    prompt = _prompt(130)
    options = EngineOptions(budget=chunk, tile=chunk)
    engine = Engine(WatchedExecutor(4, 64), options=options)
    assert engine.submit(prompt, _params(new=3)).result().tokens == _chunked()
    assert max(step.tokens for step in engine.history) == chunk


@cache
def _chunked() -> list[int]:
    return generated(_prompt(130), 3)


def test_more_requests_decode_than_the_budget_has_tokens():
    # This scheduler begins all prompts first; sarathi begins none without budget left.
    engine = _engine(budget=4, tile=2, max_running=16, scheduler="prefill-first")
    handles = [engine.submit(PROMPTS[1], _params()) for _ in range(9)]
    for _ in handles:
        engine.step()
    assert {handle.state for handle in handles} == {State.DECODING}
    engine._executor.runs.clear()
    for _ in range(9):
        assert engine.step().tokens == 4
    turns = [{piece.request for piece in run} for run in engine._executor.runs]
    for at in range(7):
        assert len(set.union(*turns[at : at + 3])) == 9, "somebody missed a turn"
    _finish(engine)
    assert all(handle.tokens == _wanted(1) for handle in handles)


def test_sixty_four_requests_with_cancellations_and_faults():
    numbers = random.Random(1)
    engine = _engine(24, max_running=20)
    handles, cancelled, faulty = [], set(), set()
    for at in range(64):
        handles.append(engine.submit(PROMPTS[at % 8], _params(at % 3 == 0)))
        if numbers.random() < 0.5:
            engine.step()
        if numbers.random() < 0.2:
            victim = numbers.choice(handles)
            cancelled |= {victim.id} if victim.cancel() else set()
        if numbers.random() < 0.15:
            fault = numbers.choice(("named", "unnamed"))
            engine._executor.faults[at] = fault
            faulty.add(at)
    _finish(engine)
    assert cancelled and faulty and sum(s.preempted for s in engine.history)
    for at, handle in enumerate(handles):
        wanted = _wanted(at % 8, at % 3 == 0)
        if at in cancelled:
            assert handle.state is State.CANCELLED
            assert handle.tokens == wanted[: len(handle.tokens)]
        elif at in faulty:
            assert handle.state is State.FAILED and not handle.tokens
        else:
            assert handle.result().tokens == wanted


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (
            _prompt(600),
            _params(new=50),
            "the prompt has 600 tokens and max_new_tokens is 50, but all 40 pages "
            "together hold 640 tokens, so it can never run; shorten the prompt, lower "
            "max_new_tokens, or give the engine more pages",
        ),
        (_prompt(90), _params(new=50), "more than the 128 tokens of max_length"),
        ([], _params(), "the prompt is empty"),
        ([1, -2], _params(), "the prompt holds -2, which is no token id"),
        ([[1, 2]], _params(), "the prompt holds [1, 2], which is no token id"),
        ("hello", _params(), "a prompt of text cannot be read"),
        ([1], SamplingParams(stop=["x"]), "stop strings cannot be read"),
    ],
)
def test_what_can_never_run_is_refused(prompt, params, message):
    limit = 128 if len(prompt) == 90 else None
    engine = _engine(max_length=limit)
    with pytest.raises(RequestError) as caught:
        engine.submit(prompt, params)
    assert message in str(caught.value)
    assert engine.idle


def test_a_request_that_just_fits_runs():
    engine = _engine(pages=5)
    handle = engine.submit(PROMPTS[4], _params(new=NEW + 1))
    assert handle.result().tokens[:NEW] == _wanted(4)


@pytest.mark.parametrize("fault", ["named", "misnamed", "unnamed", "nan"])
def test_a_fault_fails_its_request_alone(fault):
    engine = _engine()
    handles = [engine.submit(PROMPTS[at], _params()) for at in (0, 1, 5, 6)]
    engine.step()
    engine._executor.faults[1] = fault
    _finish(engine)
    assert [h.state is State.FAILED for h in handles] == [False, True, False, False]
    cause = {
        "named": "no such token",
        "misnamed": "no such request",
        "unnamed": "device fault",
        "nan": "not finite",
    }
    with pytest.raises(
        RequestError, match=f"request 1 failed in step 2.*{cause[fault]}"
    ):
        handles[1].result()
    for handle, at in zip(handles, (0, 1, 5, 6), strict=True):
        assert handle.id == 1 or handle.tokens == _wanted(at)


def test_a_fault_that_needs_company_fails_nobody():
    engine = _engine()
    handles = [engine.submit(PROMPTS[at], _params()) for at in (0, 1, 5)]
    engine._executor.faults[1] = "company"
    _finish(engine)
    assert [handle.tokens for handle in handles] == [_wanted(at) for at in (0, 1, 5)]


class _Broken(DenseExecutor):
    broken = True

    def run(self, pieces):
        logits = super().run(pieces)
        return logits[0] if self.broken else logits


def test_an_engine_whose_every_request_fails_lives_on():
    engine = Engine(_Broken(40, 16))
    handles = [engine.submit(PROMPTS[1], _params()) for _ in range(3)]
    step = engine.step()
    assert step.failed == step.ended == 3 and engine.idle
    assert "returned logits of shape [64] for 1 pieces" in str(handles[0].error)
    engine._executor.broken = False
    assert engine.submit(PROMPTS[1], _params()).result().tokens == _wanted(1)


def test_what_a_failed_request_left_in_pages_is_not_found():
    engine = _engine()
    first = engine.submit(PROMPTS[7], _params())
    engine.step()
    engine._executor.faults[first.id] = "nan"
    engine.run()
    assert first.state is State.FAILED
    again = engine.submit(PROMPTS[7], _params())
    assert again.result().statistics.shared_tokens == 0
    assert again.tokens == _wanted(7)


class _Interrupted(WatchedExecutor):
    countdown = 3

    def run(self, pieces):
        self.countdown -= 1
        if not self.countdown:
            raise KeyboardInterrupt
        return super().run(pieces)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_interrupted_step_runs_again(scheduler):
    options = EngineOptions(budget=32, tile=16, scheduler=scheduler)
    engine = Engine(_Interrupted(6, 16), options=options)
    handles = [engine.submit(PROMPTS[at], _params()) for at in (4, 1, 2)]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.check()
    _finish(engine)
    assert [handle.tokens for handle in handles] == [_wanted(at) for at in (4, 1, 2)]


def test_equal_prefixes_are_computed_once():
    engine = _engine()
    assert engine.submit(PROMPTS[4], _params()).result().tokens == _wanted(4)
    run = sum(step.tokens for step in engine.history)
    again = engine.submit(PROMPTS[4], _params()).result()
    assert again.tokens == _wanted(4)
    assert again.statistics.shared_tokens == 64  # four full pages of 70 tokens
    assert sum(step.tokens for step in engine.history) == 2 * run - 64
    engine = _engine(share_prefixes=False)
    results = [engine.submit(PROMPTS[4], _params()).result() for _ in range(2)]
    assert [result.statistics.shared_tokens for result in results] == [0, 0]
    assert [result.tokens for result in results] == [_wanted(4)] * 2


def test_the_pages_of_a_preempted_request_are_used_again():
    engine = _engine(10)
    handles = [engine.submit(_prompt(60, at), _params(new=40)) for at in range(2)]
    engine.run()
    stats = [handle.statistics for handle in handles]
    assert [s.preemptions > 0 for s in stats] == [False, True]
    assert stats[1].shared_tokens > 0
    assert [handle.tokens for handle in handles] == [
        generated(_prompt(60, at), 40) for at in range(2)
    ]


def test_requests_end_at_end_tokens_unless_told_otherwise():
    wanted = _wanted(1)
    end = wanted[4]
    cut = wanted[: wanted.index(end) + 1]
    engine = _engine(eos_token_ids=[end])
    result = engine.submit(PROMPTS[1], _params()).result()
    assert (result.tokens, result.reason) == (cut, "stop")
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    result = engine.submit(PROMPTS[1], params).result()
    assert (result.tokens, result.reason) == (wanted, "length")
    params = SamplingParams(
        max_new_tokens=NEW, ignore_eos=True, stop_token_ids=[wanted[0]]
    )
    assert engine.submit(PROMPTS[1], params).result().tokens == wanted[:1]


def test_no_end_before_the_minimum():
    end = _wanted(1)[4]
    engine = _engine(eos_token_ids=[end])
    params = SamplingParams(max_new_tokens=NEW, min_new_tokens=6)
    wanted = generated(PROMPTS[1], NEW, min_new_tokens=6, eos_token_id=end)
    assert len(wanted) >= 6
    assert engine.submit(PROMPTS[1], params).result().tokens == wanted


def test_text_comes_in_parts_and_ends_at_a_stop_string():
    tokenizer = byte_tokenizer()
    engine = Engine(DenseExecutor(40, 16), tokenizer=tokenizer)
    prompt = "!#(0>*"
    ids = tokenizer(prompt)["input_ids"]
    whole = engine.submit(prompt, _params()).result()
    assert whole.tokens == generated(ids, NEW)
    assert whole.text == tokenizer.decode(whole.tokens)
    stop = whole.text[4:6]
    at = whole.text.index(stop)
    params = SamplingParams(max_new_tokens=NEW, stop=[stop])
    handle = engine.submit(prompt, params)
    parts = list(handle.text())
    assert len(parts) > 1 and "".join(parts) == whole.text[:at]
    result = handle.result()
    assert (result.reason, result.text) == ("stop", whole.text[:at])
    assert result.tokens == whole.tokens[: at + 2]


@pytest.mark.parametrize(("minimum", "ends"), [(2, True), (3, False)])
def test_stop_strings_count_behind_the_minimum(minimum, ends):
    engine = Engine(DenseExecutor(40, 16), tokenizer=byte_tokenizer())
    whole = engine.submit("!#(0>*", _params()).result().text
    assert whole.index(whole[2]) == 2 and whole[2] not in whole[3:]
    params = SamplingParams(max_new_tokens=NEW, min_new_tokens=minimum, stop=[whole[2]])
    result = engine.submit("!#(0>*", params).result()
    assert result.text == (whole[:2] if ends else whole)


def test_a_handle_without_tokenizer_has_no_text():
    with pytest.raises(RequestError, match="has no text"):
        _engine().submit([1]).text()


def test_iterating_over_one_handle_runs_the_others_too():
    engine = _engine()
    one, other = (engine.submit(PROMPTS[at], _params()) for at in (1, 5))
    seen = []
    for token, _ in zip(one, range(4), strict=False):
        seen.append(token)
    assert seen == _wanted(1)[:4]
    assert len(other.tokens) >= 3
    assert list(other) == _wanted(5)
    assert list(one) == _wanted(1)


def test_cancelling_frees_pages_at_once_and_only_once():
    engine = _engine(6, max_running=1)
    running, waiting = (engine.submit(PROMPTS[4], _params()) for _ in range(2))
    stream = iter(running)
    next(stream)
    assert engine.free_pages == 1
    assert running.cancel() and waiting.cancel()
    assert engine.free_pages == 6 and engine.idle
    assert not running.cancel()
    assert list(stream) == _wanted(4)[1 : len(running.tokens)]
    assert running.result().reason == "cancelled"
    assert waiting.result().tokens == []


def test_threads_share_an_engine():
    engine = _engine(12)
    got: dict[int, list[int]] = {}

    def serve(at: int) -> None:
        got[at] = list(engine.submit(PROMPTS[at], _params()))

    threads = [threading.Thread(target=serve, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {at: _wanted(at) for at in range(6)}
    engine.check()


def test_statistics_count_time_from_arrival():
    ticks = iter(range(10_000))
    options = EngineOptions(budget=16, tile=16)
    engine = Engine(
        DenseExecutor(40, 16), options=options, clock=lambda: float(next(ticks))
    )
    one = engine.submit(PROMPTS[4], _params(new=3))
    two = engine.submit(PROMPTS[1], _params(new=2))
    engine.run()
    first, second = one.statistics, two.statistics
    assert first.arrival < second.arrival
    assert len(first.token_times) == 3 and len(first.times_between_tokens) == 2
    assert second.token_times[0] > first.token_times[0]
    assert first.time_to_first_token == first.token_times[0] - first.arrival
    kinds = [(step.decodes, step.chunks, step.tokens) for step in engine.history]
    assert kinds[:5] == [(0, 1, 16)] * 4 + [(0, 2, 11)]
    assert kinds[5:] == [(2, 0, 2), (1, 0, 1)]


def test_a_tensor_is_a_prompt():
    result = _engine().submit(torch.tensor(PROMPTS[1]), _params()).result()
    assert result.tokens == _wanted(1)
