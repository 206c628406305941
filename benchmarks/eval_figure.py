"""The figure of `kvzip_eval.py`, laid out as Figure 8.9: a row per group of sets, a panel per set, a line per score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from eval_tasks import TASKS, task_of

COLUMNS = 4
# the method of the dissertation in front, the full cache as a dashed line
STYLE = {"kvzip": {"color": "C3", "linewidth": 2.2, "zorder": 3}}


def draw(means: dict[tuple[str, str, float], dict[int, float]], measure: str, path: Path) -> None:
    """Write the figure.

    Args:
        means: by task, score and ratio, the mean of every context.
        measure: `"answers"` or `"nll"`, for the axis.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    tasks = sorted({task for task, _, _ in means}, key=_place)
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(_group(task), []).append(task)
    rows = [part[i : i + COLUMNS] for part in groups.values() for i in range(0, len(part), COLUMNS)]
    scores = sorted({score for _, score, _ in means} - {"full"}, key=lambda score: (score != "kvzip", score))
    width = max(len(row) for row in rows)
    legend = 1.7  # inches beside the panels
    figure = Figure(figsize=(3.1 * width + 0.4 + legend, 2.5 * len(rows) + 0.5))
    axes = figure.subplots(len(rows), width, squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for axis in line[len(row) :]:
            axis.set_axis_off()
        for task, axis in zip(row, line, strict=False):
            _panel(axis, means, task, scores)
        line[0].set_ylabel("NLL of the right answer" if measure == "nll" else "mark")
    for axis in axes[-1][: len(rows[-1])]:
        axis.set_xlabel("KV cache ratio")
    handles, labels = axes[0][0].get_legend_handles_labels()
    edge = 1 - legend / figure.get_figwidth()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(edge, 0.5), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, edge, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _place(task: str) -> int:
    return next((index for index, name in enumerate(TASKS) if task.startswith(name)), len(TASKS))


def _group(task: str) -> str:
    return task_of(task.split()[0]).group


def _panel(axis: Any, means: dict[tuple[str, str, float], dict[int, float]], task: str, scores: list[str]) -> None:
    full = means.get((task, "full", 1.0), {})
    level = float(np.mean(list(full.values()))) if full else None
    for index, score in enumerate(scores):
        points = {
            ratio: float(np.mean(list(of.values()))) for (t, s, ratio), of in means.items() if (t, s) == (task, score)
        }
        if level is not None:
            points.setdefault(1.0, level)
        ratios = sorted(points)
        place = index if index < 3 else index + 1
        other = {"color": f"C{place % 10}", "linewidth": 1.2, "linestyle": "-" if place < 10 else ":"}
        style: dict[str, Any] = STYLE.get(score, other)
        axis.plot(ratios, [points[ratio] for ratio in ratios], marker="o", markersize=3, label=score, **style)
    if level is not None:
        axis.axhline(level, color="0.4", linestyle="--", linewidth=0.9, label="full cache")
    axis.set_title(task, fontsize=9)
    axis.set_xlim(1.04, 0.06)
    axis.tick_params(labelsize=8)
    axis.grid(color="0.92")
