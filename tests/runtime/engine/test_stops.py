"""Text comes in whole characters and ends at the first stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime.engine.stops import Decoder, StopText, TextStream
from tests.runtime.engine.tokenizers import byte_tokenizer, word_tokenizer

STOP = st.text("ab", min_size=1, max_size=4)
TEXT = st.text("ab", max_size=3)


def _whole(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text up to the stop string that ends first, read by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(TEXT, max_size=8), stops=st.lists(STOP, max_size=3))
def test_stop_strings_end_the_text_however_it_is_cut(parts, stops):
    stream, shown = StopText(stops), ""
    whole = "".join(parts)
    wanted, ends = _whole(whole, stops)
    for part in parts:
        shown += stream.push(part)
        assert wanted.startswith(shown), "text was shown that a stop string removes"
    shown += stream.flush()
    assert stream.stopped == ends
    assert ends or shown == whole
    assert not ends or shown == wanted


def test_text_is_withheld_no_longer_than_needed():
    stream = StopText(["end."])
    assert stream.push("the en") == "the "
    assert stream.push("try e") == "entry "
    assert stream.push("nd. more") == ""
    assert stream.stopped


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12), prompt=st.text("ab€", max_size=4))
def test_characters_come_whole(text, prompt):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    decoder, shown = Decoder(tokenizer, tokenizer(prompt)["input_ids"]), ""
    for token in ids:
        part = decoder.push(token)
        assert "\ufffd" not in part or "\ufffd" in text
        shown += part
    assert shown + decoder.flush() == text


def test_spaces_between_words_stay():
    tokenizer = word_tokenizer(["the", "cat", "sat"])
    ids = tokenizer("the cat sat")["input_ids"]
    decoder = Decoder(tokenizer, ids[:1])
    assert [decoder.push(token) for token in ids[1:]] == [" cat", " sat"]


@pytest.mark.parametrize(
    ("broken", "text"),
    [(b"\xe2\x82", "\ufffd"), (b"\xffab", "\ufffdab"), (b"a\xf0\x9f", "a\ufffd")],
)
def test_an_incomplete_character_is_shown_at_the_end(broken, text):
    tokenizer = byte_tokenizer()
    decoder = Decoder(tokenizer)
    shown = [decoder.push(token) for token in broken]
    assert "".join(shown) + decoder.flush() == text


def test_a_stop_string_of_several_bytes_is_found():
    tokenizer = byte_tokenizer()
    stream = TextStream(Decoder(tokenizer), ["€!"])
    stopped = [stream.push(token) for token in tokenizer("5 €!x")["input_ids"]]
    assert stopped.index(True) == 5  # two characters, three bytes, "!"
    assert "".join(stream.parts) == "5 "


def test_no_stop_before_the_minimum():
    tokenizer = byte_tokenizer()
    stream = TextStream(Decoder(tokenizer), ["b"])
    assert not stream.push(*tokenizer("b")["input_ids"], may_stop=False)
    assert stream.push(*tokenizer("b")["input_ids"])
    assert "".join(stream.parts) == "b"


def test_text_withheld_for_a_stop_string_comes_when_the_tokens_end():
    tokenizer = byte_tokenizer()
    stream = TextStream(Decoder(tokenizer), ["abc"])
    for token in tokenizer("xab")["input_ids"]:
        stream.push(token)
    assert stream.parts == ["x"]
    assert not stream.finish()
    assert "".join(stream.parts) == "xab"
