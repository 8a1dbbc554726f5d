"""Remarks: what a pass did or did not do at each site that it considered."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["applied", "missed", "analysis", "failure"]


@dataclass(frozen=True)
class Remark:
    """One remark, in the manner of LLVM's: a kind, a stable code and a sentence.

    ``site`` names the place (``attention[3]``, ``graph``); ``figures`` are numbers that
    go with it, each with its unit in its name.
    """

    kind: Kind
    code: str
    message: str
    site: str = "graph"
    pass_name: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"{self.pass_name}: " if self.pass_name else ""
        return f"{where}{self.site}: {self.kind} [{self.code}] {self.message}"


def applied(site: str, message: str, **figures: Any) -> Remark:
    """Return the remark of a rewritten site."""
    return Remark("applied", "rewritten", message, site, figures=figures)


def missed(site: str, code: str, reason: str, **figures: Any) -> Remark:
    """Return the remark of a site left alone; ``code`` is one of the pass's codes."""
    return Remark("missed", code, reason, site, figures=figures)


def analysis(site: str, code: str, message: str, **figures: Any) -> Remark:
    """Return a remark that carries figures and no decision."""
    return Remark("analysis", code, message, site, figures=figures)


def failure(code: str, message: str, site: str = "graph") -> Remark:
    """Return the remark of something that broke and was undone."""
    return Remark("failure", code, message, site)
