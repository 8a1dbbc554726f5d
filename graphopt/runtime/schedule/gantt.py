"""A timeline as a picture: one row a processor, one colour a chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.runtime.schedule.simulator import Timeline


def draw_gantt(axes: Any, timeline: Timeline, title: str = "") -> None:
    """Fill matplotlib ``axes`` with the tasks of ``timeline``; dynamic ones hatched."""
    colours = _pyplot().get_cmap("tab10")
    names = [processor.name for processor in timeline.processors]
    labelled: set[int] = set()
    for ran in timeline.ran:
        task = timeline.dag.tasks[ran.task]
        new = task.chunk not in labelled
        labelled.add(task.chunk)
        axes.broken_barh(
            [(ran.start, ran.end - ran.start)],
            (names.index(ran.processor) - 0.4, 0.8),
            facecolors=colours(task.chunk % 10),
            edgecolor="white",
            linewidth=0.2,
            hatch="////" if task.group.dynamic else None,
            label=f"chunk {task.chunk}" if new else None,
        )
    rates = [f"{name}\n{timeline.bubble_rate(name):.1%} idle" for name in names]
    axes.set_yticks(range(len(names)), rates)
    axes.set_xlim(0, timeline.makespan or 1.0)
    axes.set_title(title, fontsize="small", loc="left")


def save_gantt(timelines: dict[str, Timeline], path: Path) -> None:
    """Write a picture with one row of axes for each titled timeline, one scale for all.

    Raises GraphoptError where matplotlib is not installed.
    """
    pyplot = _pyplot()
    figure, rows = pyplot.subplots(
        len(timelines),
        figsize=(8.0, 1.0 + 1.3 * len(timelines)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, timeline) in zip(rows[:, 0], timelines.items(), strict=True):
        draw_gantt(axes, timeline, title)
    longest = max(timeline.makespan for timeline in timelines.values())
    rows[-1, 0].set_xlim(0, longest)
    rows[-1, 0].set_xlabel("seconds")
    handles = rows[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", fontsize="x-small", ncols=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise GraphoptError(
            "a Gantt chart needs matplotlib, which is not installed; "
            "pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
