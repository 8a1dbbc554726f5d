"""What a pass says about itself, for ``graphopt passes`` and the written reference."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from graphopt.config_text import print_text
from graphopt.passes.base import Pass


@dataclass(frozen=True)
class OptionHelp:
    """One option; ``default`` is written as a pass config writes it."""

    name: str
    type: str
    default: str
    unit: str
    help: str


@dataclass(frozen=True)
class PassHelp:
    """A pass: the first line of its docstring, the whole of it, and its options."""

    name: str
    summary: str
    source: str
    exact: bool
    text: str
    options: tuple[OptionHelp, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def describe_pass(cls: type[Pass]) -> PassHelp:
    """Return what ``cls`` says about itself."""
    text = inspect.cleandoc(cls.__doc__ or "")
    summary = text.split("\n\n")[0].replace("\n", " ")
    options = tuple(_options(cls))
    return PassHelp(cls.name, summary, cls.source, cls.exact, text, options)


def _options(cls: type[Any]) -> Iterator[OptionHelp]:
    """Yield the options of the class itself, then those that every pass has."""
    hints = get_type_hints(cls, include_extras=True)
    shared = {f.name for f in fields(Pass)}
    for item in sorted(fields(cls), key=lambda f: f.name in shared):
        yield OptionHelp(
            item.name,
            type_text(hints[item.name]),
            _default(item),
            item.metadata.get("unit", ""),
            item.metadata.get("help", ""),
        )


def type_text(hint: Any) -> str:
    """Return a type as a reader of TOML would say it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = [_limit(m) for m in getattr(arguments[1], "metadata", ())]
        return " ".join([type_text(arguments[0]), *filter(None, limits)])
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (Union, UnionType):
        return " | ".join(type_text(a) for a in arguments if a is not NoneType)
    if origin in (list, tuple):
        return f"list of {type_text(arguments[0])}"
    if is_dataclass(hint) and isinstance(hint, type):
        return "{" + ", ".join(f.name for f in fields(hint)) + "}"
    names = {bool: "true | false", int: "integer", float: "number", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _limit(bound: Any) -> str:
    """Return ``>= 0`` for an annotated-types bound."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " ".join(
        f"{sign} {getattr(bound, key)}"
        for key, sign in signs.items()
        if hasattr(bound, key)
    )


def _default(item: Field[Any]) -> str:
    value = item.default
    if item.default_factory is not MISSING:
        value = item.default_factory()
    if value is MISSING:
        return "required"
    if value is None:
        return "left out"
    return print_text("", {"x": value}).removeprefix("{x=").removesuffix("}")


def reference(classes: Iterable[type[Pass]]) -> str:
    """Return the pass-config reference as Markdown (docs/passes.md)."""
    parts = ["# Passes and their options", _GENERATED]
    for cls in classes:
        described = describe_pass(cls)
        exact = "exact up to rounding" if described.exact else "approximate"
        parts += [f"## {described.name}", f"Source: {described.source}. {exact}."]
        parts += [described.text, _table(described.options)]
    return "\n\n".join(parts) + "\n"


_GENERATED = "Written by `graphopt passes --markdown` from the code; do not edit."


def _table(options: Iterable[OptionHelp]) -> str:
    rows = ["| option | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for o in options:
        kind = o.type.replace("|", "\\|")
        rows.append(f"| `{o.name}` | {kind} | {o.default} | {o.unit} | {o.help} |")
    return "\n".join(rows)
