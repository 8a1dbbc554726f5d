"""The compile report: what was found, done and left, per compiled graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.diff import unified_diff
from graphopt.pipeline import PassRecord
from graphopt.remarks import Remark


@dataclass
class CompileReport:
    """One compiled graph.

    ``structure`` has a row a layer, ``ends`` names embedding, final norm and LM head.
    ``seconds`` holds the wall time of each stage (raise, passes, compile), ``cost`` the
    predicted FLOPs and bytes before and after, ``kernels`` the emitted files.
    """

    kind: str
    config: str
    structure: list[dict[str, Any]]
    records: list[PassRecord]
    remarks: list[Remark] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    key: str = ""
    ends: str = ""
    directory: Path | None = None

    def all_remarks(self) -> list[Remark]:
        """Return the remarks of the compiler and of every pass, in order."""
        return [*self.remarks, *(r for record in self.records for r in record.remarks)]

    def diffs(self) -> dict[str, str]:
        """Return the unified diff of the normalised graph for each pass that edited."""
        return {
            f"{i:02d}-{record.name}": unified_diff(record.before, record.after)
            for i, record in enumerate(self.records)
            if record.changed
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; diffs are files beside it."""
        return {
            "kind": self.kind,
            "key": self.key,
            "config": self.config,
            "structure": self.structure,
            "ends": self.ends,
            "remarks": [r.as_dict() for r in self.all_remarks()],
            "passes": [_pass_dict(record) for record in self.records],
            "seconds": self.seconds,
            "cost": self.cost,
            "kernels": self.kernels,
        }

    def write(self, root: Path) -> None:
        """Write report.json and a diff per pass under ``root``/<key>.

        A warm start writes the same files again: passes run in every process, and only
        Inductor's work comes from its cache.
        """
        directory = root / self.key
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self.diffs().items():
            _replace(directory / f"{name}.diff", text)
        text = json.dumps(self.as_dict(), indent=1, default=str)
        _replace(directory / "report.json", text)
        self.directory = directory


def report_key(parts: Iterable[str]) -> str:
    """Return the name of a report: a hash of what decides its content."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _pass_dict(record: PassRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "seconds": record.seconds,
        "changed": record.changed,
        "statistics": record.statistics,
    }


def _replace(path: Path, text: str) -> None:
    """Write by renaming, so that a reader never sees half a file."""
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
