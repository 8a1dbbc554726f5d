"""Dataclasses whose wrong values give one clear message."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, ValidationError

from graphopt.errors import ConfigError, did_you_mean

STRICT = ConfigDict(extra="forbid", strict=True)


def checked(cls: type, values: Any, handler: Any) -> Any:
    """Return what ``handler`` makes of the values of a dataclass.

    Raises ConfigError with the class, the field, the cause and the value given.
    """
    try:
        return handler(values)
    except ValidationError as error:
        raise ConfigError(f"{cls.__name__}: {_explain(error, cls)}") from None


def _explain(error: ValidationError, cls: type) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "unexpected_keyword_argument":
        fields: Any = cls.__dict__["__dataclass_fields__"]
        return f"unknown option '{key}'{did_you_mean(key, fields)}"
    if not key:
        return message
    return f"option '{key}': {message}, not {first['input']!r}"
