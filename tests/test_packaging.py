"""What a wheel holds: the code behind the symlinks, templates and type marker."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "init", "-q", source], check=True)
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    copy = ["tar", "-cf", "-", *filter(None, files)]
    packed = subprocess.run(copy, cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-xf", "-"], cwd=source, input=packed, check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run(
        [*build, "--outdir", folder, source], check=True, capture_output=True
    )
    return set(zipfile.ZipFile(next(folder.glob("*.whl"))).namelist())


@pytest.mark.parametrize("package", ["passes", "codegen"])
def test_real_code_behind_a_relative_symlink(package):
    link = ROOT / "graphopt" / package
    assert link.is_symlink()
    assert link.readlink() == Path("..") / package


def test_every_source_file_is_in_the_wheel(wheel_names):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "graphopt").rglob("*")
        if path.suffix in (".py", ".in", ".typed")
    }
    for package in ("passes", "codegen"):
        wanted |= {
            "graphopt/" + path.relative_to(ROOT).as_posix()
            for path in (ROOT / package).rglob("*")
            if path.suffix in (".py", ".in")
        }
    assert len(wanted) > 60
    assert wanted <= wheel_names


def test_nothing_else_is_installed(wheel_names):
    tops = {name.split("/")[0].split("-")[0] for name in wheel_names}
    assert tops == {"graphopt"}


@pytest.mark.parametrize(
    ("group", "name"),
    [("torch_dynamo_backends", "graphopt"), ("pytest11", "graphopt")],
)
def test_entry_points_load(group, name):
    found = [p for p in entry_points(group=group) if p.name == name]
    assert len(found) == 1
    assert found[0].load() is not None


def test_importing_the_package_and_its_plug_in_leaves_torch_alone():
    program = (
        "import sys, graphopt, graphopt.pytest_plugin; print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
