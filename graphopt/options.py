"""The options of ``torch.compile(backend="graphopt", options={...})``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from graphopt._compat import inductor_mode, inductor_option_names
from graphopt.config import PassConfig, load_config
from graphopt.errors import ConfigError, did_you_mean

VERIFY = ("off", "structure", "numeric")


@dataclass(frozen=True)
class BackendOptions:
    """Checked options; see `parse_options` for what each key takes."""

    config: PassConfig
    verify: str = "structure"
    report: Path | None = None
    strict: bool = False
    outline: int = 1  # layers of a compiled piece; 0: the graph stays whole
    inductor: dict[str, Any] = field(default_factory=dict)


def parse_options(
    options: Mapping[str, Any] | None, mode: str | None = None
) -> BackendOptions:
    """Check ``options`` and ``mode``.

    Keys: ``config`` (path, dict, one-line text or None), ``verify`` (off, structure,
    numeric), ``report`` (directory), ``strict``, ``outline`` (repeated layers are
    compiled once: True, False, or how many layers a compiled piece has) and
    ``inductor`` (a dict of Inductor's own options). Raises ConfigError with the nearest
    right name.
    """
    given = dict(options or {})
    names = [f.name for f in fields(BackendOptions)]
    for key in given:
        if key not in names:
            hint = did_you_mean(key, names)
            if key in inductor_option_names():
                hint = "; it is Inductor's: put it under options['inductor']"
            raise ConfigError(f"options: unknown key '{key}'{hint}")
    _check_verify(given.get("verify", "structure"))
    if not isinstance(given.get("strict", False), bool):
        raise ConfigError(
            f"options: 'strict' is True or False, not {given['strict']!r}"
        )
    given["outline"] = _outline(given.get("outline", True))
    report = given.get("report")
    given["report"] = Path(report) if report is not None else None
    given["config"] = load_config(given.get("config"))
    given["inductor"] = _inductor(given.get("inductor"), mode)
    return BackendOptions(**given)


def _check_verify(value: object) -> None:
    if value not in VERIFY:
        hint = did_you_mean(str(value), VERIFY)
        raise ConfigError(f"options: verify = {value!r} is not known{hint}")


def _outline(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        what = "True, False or a number of layers"
        raise ConfigError(f"options: 'outline' is {what}, not {value!r}")
    return int(value)


def _inductor(options: Any, mode: str | None) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options: 'inductor' is a dict, not {options!r}")
    try:
        patches = inductor_mode(mode, None) if mode and mode != "default" else {}
    except RuntimeError as error:
        raise ConfigError(f"mode: {error}") from None
    known = set(inductor_option_names())
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"options: inductor has no option '{key}'{hint}")
        patches[name] = value
    return patches
