"""Files of partial results: written whole, refused under other settings."""

from __future__ import annotations

import pytest

from graphopt.errors import ConfigError
from graphopt.search.partial import Partial

SETTINGS = {"seed": 0, "lengths": (1024, 2048)}


def test_parts_come_back(tmp_path):
    path = tmp_path / "it.partial"
    first = Partial(path, SETTINGS)
    assert first.parts == {}
    first.keep("layer 0", [1, 2.5])
    first.keep("layer 1", {"a": "b"})
    again = Partial(path, SETTINGS)
    assert again.parts == {"layer 0": [1, 2.5], "layer 1": {"a": "b"}}
    again.remove()
    assert not list(tmp_path.iterdir())


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "it.partial"
    Partial(path, SETTINGS).keep("layer 0", 1)
    with pytest.raises(ConfigError, match="begun with seed = 0, now it is 1"):
        Partial(path, {**SETTINGS, "seed": 1})
    with pytest.raises(ConfigError, match="budget = None, now it is 0"):
        Partial(path, {**SETTINGS, "budget": 0.3})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"parts": {}}'])
def test_a_damaged_file_says_what_to_do(tmp_path, text):
    path = tmp_path / "it.partial"
    path.write_text(text)
    with pytest.raises(ConfigError, match="delete it to start anew"):
        Partial(path, SETTINGS)
