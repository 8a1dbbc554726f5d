"""Written documents agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphopt.pass_help import reference
from graphopt.registry import pass_class, pass_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_pass_reference_is_that_of_the_code():
    written = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    command = "graphopt passes --markdown > docs/passes.md"
    assert written == reference(map(pass_class, pass_names())), command


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]


def test_the_pass_in_the_readme_runs():
    from graphopt.pipeline import run_passes
    from tests.models import TINY, capture, token_ids

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "Pass)" in b
    )
    scope: dict[str, object] = {"__name__": "readme"}
    exec("import sys, types; sys.modules['readme'] = types.ModuleType('readme')", {})
    exec(block, scope)
    gm = capture(TINY["llama"](), input_ids=token_ids(1, 20))[0]
    record = run_passes(gm, [scope["LocalAttention"](window=8)])[0]
    assert [r.kind for r in record.remarks] == ["applied", "applied"]
