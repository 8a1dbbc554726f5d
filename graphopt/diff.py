"""Unified diffs of normalised graph text."""

from __future__ import annotations

import difflib
import re
from typing import Any


def unified_diff(before: str, after: str, context: int = 2) -> str:
    """Return the unified diff of two texts, without file headers; empty when equal."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), n=context, lineterm=""
    )
    return "\n".join(list(lines)[2:])


def coloured(diff: str) -> Any:
    """Return ``diff`` as rich text: removals red, additions green, places cyan."""
    from rich.text import Text

    styles = {"+": "green", "-": "red", "@": "cyan"}
    text = Text()
    for line in diff.splitlines():
        text.append(line + "\n", style=styles.get(line[:1], ""))
    return text


def layer_text(text: str, layer: int) -> str:
    """Keep the lines that define a layer's values or name its parameters."""
    own = re.compile(rf"%L{layer}\.|input %.*\b(layers?|h|blocks?)\.{layer}\.")
    return "".join(line for line in text.splitlines(True) if own.match(line))
