"""The text of a request as its tokens come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Decoding starts a few tokens before the new ones: a tokenizer may write a token
# otherwise at the start of a text, without its space.
_CONTEXT = 6
_INCOMPLETE = "\ufffd"


class Decoder:
    """Turns tokens into text one at a time; no character comes in parts.

    ``tokenizer`` is a transformers tokenizer, or anything with such a ``decode``.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._start = 0
        self._read = len(self._tokens)

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes: empty inside of a character."""
        self._tokens.append(token)
        text = self._behind()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        self._trim()
        return text

    def flush(self) -> str:
        """Return what an incomplete character at the end still reads as."""
        text = self._behind()
        self._read = len(self._tokens)
        return text

    def _behind(self) -> str:
        known = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _trim(self) -> None:
        # Only the tokens from _start on are read again.
        del self._tokens[: self._start]
        self._read -= self._start
        self._start = 0


class StopText:
    """Text in which the first stop string to be completed ends everything.

    Text that may be the beginning of a stop string is withheld until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that can be shown now; nothing once ``stopped``."""
        if self.stopped:
            return ""
        self._held += text
        end = self._first_stop()
        if end is not None:
            shown, self._held, self.stopped = self._held[:end], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Return the text that was withheld: no stop string can come any more."""
        shown, self._held = self._held, ""
        return shown

    def _first_stop(self) -> int | None:
        """Return where the stop string begins that ends first, as by character."""
        found = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(at + len(stop), at) for at, stop in found if at >= 0]
        return min(ends)[1] if ends else None


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """The shown text of one request: decoded, and cut at its stop strings."""

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = StopText(stops)
        self.parts: list[str] = []

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Add a token; tell whether a stop string ended the text.

        Where it may not stop, stop strings up to here are text as any other.
        """
        text = self._decoder.push(token)
        if may_stop:
            self._show(self._stops.push(text))
        else:
            self._show(text)
        return self._stops.stopped

    def finish(self) -> bool:
        """Show what was withheld; tell whether a stop string was in it."""
        if not self._stops.stopped:
            self._show(self._stops.push(self._decoder.flush()))
            self._show(self._stops.flush())
        return self._stops.stopped

    def _show(self, text: str) -> None:
        if text:
            self.parts.append(text)
