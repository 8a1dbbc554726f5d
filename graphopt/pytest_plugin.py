"""The pytest plug-in: graph-diff tests with golden files.

``graph_diff(model, passes, golden, **inputs)`` captures the model's graph, runs the
passes, and compares the normalised diff and the remarks with a golden file;
``pytest --update-graphs`` writes the files anew. torch is imported by the first test
that asks for the fixture, so that other test suites pay nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-graphs`` and ``graph_diff_golden``."""
    group = parser.getgroup("graphopt")
    group.addoption(
        "--update-graphs",
        action="store_true",
        help="write the golden files of graph_diff tests anew",
    )
    parser.addini(
        "graph_diff_golden",
        "folder of the golden files, from the root; left out: golden/ beside the test",
        default="",
    )


class GraphDiff:
    """What the fixture gives: call it to compare one model under one pipeline.

    Golden files lie under ``root``: the folder of the ini option ``graph_diff_golden``,
    or ``golden/`` beside the test's file.
    """

    def __init__(self, root: Path, update: bool) -> None:
        self.root = root
        self.update = update

    def __call__(
        self,
        model: torch.nn.Module,
        passes: str | Path | Mapping[str, Any],
        golden: str,
        *,
        layer: int | None = None,
        dynamic: bool | None = True,
        **inputs: Any,
    ) -> str:
        """Compare the diff of ``passes`` on ``model(**inputs)`` with a golden file.

        ``passes`` is what the option ``config`` takes. ``layer`` keeps the diff to one
        layer. Returns the text; fails the test when it differs, or when there is no
        golden file.
        """
        __tracebackhide__ = True
        from graphopt.graph_diff import diff_text

        actual = diff_text(model, passes, inputs, layer=layer, dynamic=dynamic)
        path = self.root / f"{golden}.diff"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(actual, encoding="utf-8")
        elif not path.exists():
            pytest.fail(f"{path}: no golden file; run pytest --update-graphs", False)
        else:
            _compare(path, actual)
        return actual


def _compare(path: Path, actual: str) -> None:
    __tracebackhide__ = True
    expected = path.read_text(encoding="utf-8")
    if actual == expected:
        return
    lines = difflib.unified_diff(
        expected.splitlines(), actual.splitlines(), str(path), "now", lineterm=""
    )
    text = "\n".join(lines)
    pytest.fail(f"the graph differs (--update-graphs accepts it):\n{text}", False)


@pytest.fixture
def graph_diff(request: pytest.FixtureRequest) -> GraphDiff:
    """Give the comparer of graph diffs with golden files; see `GraphDiff`."""
    update = bool(request.config.getoption("--update-graphs"))
    folder = str(request.config.getini("graph_diff_golden"))
    beside = request.path.parent / "golden"
    return GraphDiff(request.config.rootpath / folder if folder else beside, update)
