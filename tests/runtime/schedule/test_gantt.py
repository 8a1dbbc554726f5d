"""The picture of a timeline."""

from __future__ import annotations

import builtins

import pytest

from graphopt.errors import GraphoptError
from graphopt.runtime.schedule.dag import chunk_dag, repeated
from graphopt.runtime.schedule.gantt import draw_gantt, save_gantt
from graphopt.runtime.schedule.policies import POLICIES
from graphopt.runtime.schedule.simulator import simulate
from tests.runtime.schedule.graphs import CPU, NPU, PAPER


def timeline(policy):
    dag = chunk_dag(repeated(PAPER, 2), 3, lambda i, j: 1.0 + i + j % 4)
    return simulate(dag, (NPU, CPU), POLICIES[policy])


def test_one_bar_a_task():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    found = timeline("greedy")
    draw_gantt(axes, found, "greedy")
    assert len(axes.collections) == len(found.ran)
    extents = [c.get_paths()[0].get_extents() for c in axes.collections]
    for ran, box in zip(found.ran, extents, strict=True):
        assert (box.x0, box.x1) == pytest.approx((ran.start, ran.end))
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[0] == f"npu\n{found.bubble_rate('npu'):.1%} idle"
    pyplot.close(figure)


def test_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    save_gantt({n: timeline(n) for n in ("in-order", "greedy")}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GraphoptError, match="pip install matplotlib"):
        save_gantt({"greedy": timeline("greedy")}, tmp_path / "a.png")
