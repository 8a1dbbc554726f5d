"""Pass configs: TOML files, dictionaries and one-line text, all to one pipeline."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from graphopt.config_text import parse_text, print_text
from graphopt.errors import ConfigError, did_you_mean
from graphopt.passes.base import Pass
from graphopt.registry import pass_class

Source = "PassConfig | str | Path | Mapping[str, Any] | None"

# Lossless passes that run first, and last, unless ``defaults = false`` or the list is
# empty. Last: other passes read linears that are still spelt as the model did.
DEFAULT_FIRST = ("structured-mask",)
DEFAULT_LAST = ("skinny-linear",)
_TOP_LEVEL = ("defaults", "pass")


@dataclass(frozen=True)
class PassConfig:
    """A checked pipeline and where it came from."""

    pipeline: tuple[Pass, ...]
    origin: str = "default"

    def text(self) -> str:
        """Return the whole pipeline as one line, which `load_config` reads back."""
        return ",".join(print_text(p.name, p.options()) for p in self.pipeline)

    def toml(self) -> str:
        """Return the pipeline as a TOML file, which `load_config` reads back."""
        lines = ["defaults = false"]
        if not self.pipeline:
            lines.append("pass = []")
        for item in self.pipeline:
            lines += ["", "[[pass]]", f'name = "{item.name}"']
            lines += [f"{k} = {_toml(v)}" for k, v in item.options().items()]
        return "\n".join(lines) + "\n"


def load_config(
    source: PassConfig | str | Path | Mapping[str, Any] | None,
) -> PassConfig:
    """Read a pipeline from a TOML path, a dictionary, one-line text, or None.

    None is the default pipeline and an empty text or list the empty one. Raises
    ConfigError with file, line, key, cause and the nearest right name.
    """
    if source is None:
        return _build({}, "default", "")
    if isinstance(source, PassConfig):
        return source
    if isinstance(source, Mapping):
        return _build(source, "config", "")
    if isinstance(source, Path) or _looks_like_path(source):
        return _from_file(Path(source))
    entries = [{"name": name, **options} for name, options in parse_text(source)]
    return _build({"defaults": False, "pass": entries}, "config", "")


def _looks_like_path(text: str) -> bool:
    return text.endswith(".toml") or ("{" not in text and "/" in text)


def _from_file(path: Path) -> PassConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path}: cannot read the pass config: {reason}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: a pass config is UTF-8 text; this is not") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return _build(data, str(path), text)


def _build(data: Mapping[str, Any], origin: str, text: str) -> PassConfig:
    for key in data:
        if key not in _TOP_LEVEL:
            hint = did_you_mean(key, _TOP_LEVEL)
            raise ConfigError(f"{_at(origin, text, key)}: unknown key '{key}'{hint}")
    entries = data.get("pass", None)
    if entries is not None and not _is_table_list(entries):
        raise ConfigError(
            f"{_at(origin, text, 'pass')}: 'pass' is a list of tables, "
            "each begun by a line [[pass]]"
        )
    use_defaults = data.get("defaults", True)
    if not isinstance(use_defaults, bool):
        raise ConfigError(
            f"{_at(origin, text, 'defaults')}: 'defaults' is true or false, "
            f"not {use_defaults!r}"
        )
    passes = [_make(e, i, origin, text) for i, e in enumerate(entries or [])]
    if use_defaults and entries != []:
        passes = [*_unnamed(DEFAULT_FIRST, passes), *passes]
        passes = [*passes, *_unnamed(DEFAULT_LAST, passes)]
    _check_order(passes, origin, text)
    return PassConfig(tuple(passes), origin)


def _unnamed(names: Sequence[str], passes: Sequence[Pass]) -> list[Pass]:
    """Return the passes ``names`` that a pipeline does not have already."""
    named = {p.name for p in passes}
    return [pass_class(n)() for n in names if n not in named]


def _check_order(pipeline: Sequence[Pass], origin: str, text: str) -> None:
    """Raise ConfigError for a pass that cannot work behind one before it."""
    for index, item in enumerate(pipeline):
        for before in pipeline[:index]:
            if reason := item.never_after.get(before.name):
                raise ConfigError(
                    f"{_at(origin, text, 'name', index)}: {item.name} cannot stand "
                    f"behind {before.name}: {reason}"
                )


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, Mapping) for v in value)


def _make(entry: Mapping[str, Any], index: int, origin: str, text: str) -> Pass:
    options = dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"{_at(origin, text, 'pass', index)}: pass {index + 1} has no "
            'name; write name = "..." under [[pass]]'
        )
    try:
        cls = pass_class(name)
    except ConfigError as error:
        raise ConfigError(f"{_at(origin, text, 'name', index)}: {error}") from None
    options = {key.replace("-", "_"): value for key, value in options.items()}
    _resolve_files(cls, options, origin)
    try:
        # Strict validation takes a nested table for a dataclass only from JSON.
        return _adapter(cls).validate_json(json.dumps(options, default=str))
    except ValidationError as error:
        raise ConfigError(_explain(error, cls, index, origin, text)) from None


def _resolve_files(cls: type[Pass], options: dict[str, Any], origin: str) -> None:
    """Files that a config names lie beside it."""
    if not origin.endswith(".toml"):
        return
    for item in fields(cls):
        value = options.get(item.name)
        if item.metadata.get("unit") == "file" and isinstance(value, str):
            options[item.name] = str(Path(origin).parent / value)


def _adapter(cls: type[Pass]) -> TypeAdapter[Pass]:
    # Unknown options are errors; strings do not become numbers.
    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return TypeAdapter(cls)


def _explain(
    error: ValidationError, cls: type[Pass], index: int, origin: str, text: str
) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = location[0] if location else "pass"
    where = f"{_at(origin, text, key, index)}: {cls.name}"
    if first["type"] == "unexpected_keyword_argument":
        names = [f for f in cls.__dataclass_fields__ if f != "name"]
        return f"{where}: unknown option '{key}'{did_you_mean(key, names)}"
    message = first["msg"].removeprefix("Value error, ")
    if not location:
        return f"{where}: {message}"
    given = f", not {first['input']!r}" if "input" in first else ""
    return f"{where}: option '{'.'.join(location)}': {message}{given}"


def _at(origin: str, text: str, key: str, index: int | None = None) -> str:
    """Return ``file:line`` of a key, as near as the text allows."""
    lines = text.splitlines()
    start = 0
    if index is not None:
        headers = [i for i, s in enumerate(lines) if re.match(r"\s*\[\[pass\]\]", s)]
        if index < len(headers):
            start = headers[index]
    spellings = {key, key.replace("_", "-")}
    pattern = re.compile(r"\s*\[*\s*(" + "|".join(map(re.escape, spellings)) + r")\b")
    for number, line in enumerate(lines[start:], start + 1):
        if pattern.match(line):
            return f"{origin}:{number}"
    return origin


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if hasattr(value, "__dataclass_fields__"):
        return _toml(
            {
                k: getattr(value, k)
                for k in value.__dataclass_fields__
                if getattr(value, k) is not None
            }
        )
    return repr(value)
