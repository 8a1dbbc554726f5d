"""Memory of mapped files: let go of, and there again when it is read."""

import mmap
import sys

import pytest
import torch

from graphopt.memory import forget, page_out_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")


def mapped(path, values):
    """Write values to a file; return them mapped, each page a copy when written to."""
    path.write_bytes(values.numpy().tobytes())
    with path.open("r+b") as file:
        return torch.frombuffer(
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.float32
        )


def resident(name):
    """Return the bytes of a mapped file that this process has in memory."""
    from pathlib import Path

    lines = Path("/proc/self/smaps").read_text().splitlines()
    places = [i for i, line in enumerate(lines) if line.endswith(name)]
    found = [next(x for x in lines[i:] if x.startswith("Rss:")) for i in places]
    return sum(int(line.split()[1]) for line in found) * 1024


def test_files_are_let_go_of_and_read_again(tmp_path):
    values = torch.randn(1 << 16)
    held = mapped(tmp_path / "a.weights", values)
    assert torch.equal(held, values)
    assert resident("a.weights") == values.nbytes
    page_out_files(".others")
    assert resident("a.weights") == values.nbytes
    page_out_files(".weights")
    assert resident("a.weights") == 0
    assert torch.equal(held, values)


def test_what_was_written_to_stays(tmp_path):
    values = torch.randn(1 << 16)
    held = mapped(tmp_path / "b.weights", values)
    held[5] = 3.0
    page_out_files(".weights")
    assert held[5] == 3.0 and torch.equal(held[6:], values[6:])


def test_forgotten_pages_are_a_parts_own(tmp_path):
    """The pages that a part shares with its neighbours stay."""
    values = torch.randn(1 << 16)
    held = mapped(tmp_path / "c.weights", values)
    held += 1
    forget(held[100:20_000])
    rest = [*range(100), *range(20_000, 1 << 16)]
    assert torch.equal(held[rest], values[rest] + 1)
    assert resident("c.weights") < values.nbytes
