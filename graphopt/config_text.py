"""The one-line form of a pipeline: ``name{key=value,...},name{...}``.

Values are TOML values; a bare word is a string, so ``pattern=a-shape`` needs no quotes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from graphopt.errors import ConfigError

_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_OPEN, _CLOSE = "[{", "]}"


def parse_text(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the (name, options) pairs of a one-line pipeline.

    Raises ConfigError that quotes the part that cannot be read.
    """
    result = []
    for part in _split(text, ","):
        name, brace, rest = part.partition("{")
        if not _WORD.fullmatch(name.strip()) or (brace and not rest.endswith("}")):
            raise ConfigError(f"config: cannot read '{part}'; write name{{key=value}}")
        result.append((name.strip(), _options(rest[:-1] if brace else "")))
    return result


def _options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in _split(text, ","):
        key, equals, value = part.partition("=")
        if not equals or not _WORD.fullmatch(key.strip()):
            raise ConfigError(f"config: cannot read '{part}'; write key=value")
        if key.strip() in options:
            raise ConfigError(f"config: option '{key.strip()}' is given twice")
        options[key.strip()] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    if _WORD.fullmatch(text) and text not in ("true", "false", "inf", "nan"):
        return text
    if text.startswith("[") and text.endswith("]"):
        return [_value(item) for item in _split(text[1:-1], ",")]
    if text.startswith("{") and text.endswith("}"):
        return _options(text[1:-1])
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f"config: cannot read the value '{text}': a path or other text with more "
            "than letters, digits, '-' and '_' stands in quotes"
        ) from None


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets and quotes; empty parts are errors."""
    parts, depth, quoted, current = [], 0, False, ""
    for character in text:
        quoted ^= character == '"'
        depth += (character in _OPEN) - (character in _CLOSE) if not quoted else 0
        if character == separator and depth == 0 and not quoted:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if depth != 0 or quoted:
        raise ConfigError(f"config: a bracket or quote is not closed in '{text}'")
    if text.strip():
        parts.append(current.strip())
    if any(not part for part in parts):
        raise ConfigError(f"config: there is nothing between two commas in '{text}'")
    return parts


def print_text(name: str, options: Mapping[str, Any]) -> str:
    """Return ``name{key=value}``, without braces when there is no option."""
    if not options:
        return name
    return f"{name}{{{_print_options(options)}}}"


def _print_options(options: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={_print(value)}" for key, value in options.items())


def _print(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else f'"{value}"'
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_print(v) for v in value) + "]"
    if hasattr(value, "__dataclass_fields__"):
        value = {
            k: getattr(value, k)
            for k in value.__dataclass_fields__
            if getattr(value, k) is not None
        }
    if isinstance(value, Mapping):
        return "{" + _print_options(value) + "}"
    return repr(value)
