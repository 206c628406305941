"""The page of a report of several labels a row: the decisions that are likeliest wrong, outliers, then every dropped row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..progress import track
from .multi_label import MultiLabelReport
from .pages import PAGE, Shown, render


def write_sets_page(
    report: MultiLabelReport,
    dataset: Any,
    path: str | Path,
    *,
    count: int = 24,
    dropped: Mapping[int, str] | None = None,
    quiet: bool = False,
) -> Path:
    """Self-contained HTML: facts, the decisions to look at first, outliers; then all dropped rows, 100 to a page beside it.

    Args:
        report: what was found.
        dataset: the fitted dataset; its first image column is shown, else its first text column.
        path: file to write.
        count: decisions, half as many outliers.
        dropped: rows that were dropped and why; default `report.dropped()`.
        quiet: no progress bar.

    Returns:
        The path.

    Raises:
        ValueError: another dataset than was fitted.
    """
    shown = Shown(report, dataset, None)
    path, gone = Path(path), report.dropped() if dropped is None else dropped
    names = [f"{path.stem}-dropped-{k + 1}.html" for k in range(-(-len(gone) // PAGE))]
    same: dict[str, Any] = {
        "title": f"Label report: {report.label_column}",
        "score_name": "probability that the decision is wrong",
        "links": names,
        "total": len(gone),
        "first": path.name,
        "entries": [],
        "maps": [],
    }
    worst = [
        {
            "item": shown.item(one["row"]),
            "why": f"{'without' if one['given'] else 'with'} {one['label']}",
            "score": one["wrong"],
            "suggested": None,
        }
        for one in report.review(count)
    ]
    odd = shown.items(np.argsort(-report.outlier_score, kind="stable")[: max(1, count // 2)], None)
    render(
        path,
        **same,
        facts=report.facts(),
        heading="Decisions to look at first",
        dropped=worst,
        outliers=odd,
        here=path.name,
    )
    rows = list(gone.items())
    for k, name in enumerate(track(names, "Dropped rows", unit="page", disable=quiet)):
        cells = [_dropped(report, shown, row, why) for row, why in rows[k * PAGE : (k + 1) * PAGE]]
        render(path.with_name(name), **same, facts=[], heading="Dropped rows", dropped=cells, outliers=[], here=name)
    return path


def _dropped(report: MultiLabelReport, shown: Shown, row: int, why: str) -> dict[str, Any]:
    """One cell of the dropped rows, with what the row would be labelled."""
    score = report.outlier_score[row] if why == "outlier" else report.label_noise_score[row].max()
    better = None
    if why == "label error":
        new = np.where(report.is_label_error[row], 1 - report.sets.given[row], report.sets.given[row])
        better = ", ".join(report.sets.names[label] for label in np.flatnonzero(new > 0)) or "no label"
    return {"item": shown.item(row, size=96), "why": why, "score": score, "suggested": better}
