"""The doctor's letter: the worst rows and the evidence against them, then every dropped row, as HTML (and a PNG for images)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decoding import read_picture
from ..errors import MissingExtraError
from ..progress import track
from .evidence import Evidence
from .report import RelationReport
from .summary import SCORES, facts

if TYPE_CHECKING:
    from jinja2 import Template

    from .multi_label import MultiLabelReport

TEMPLATE = Path(__file__).with_name("pages.html.jinja")
MAPS = 3
PAGE = 100  # dropped rows on one page
LEAST = 0.0051  # relations below it may be shown as 0.00, and are left out


@dataclass(frozen=True)
class Item:
    """One row as it is shown, by its number in the dataset that was given to `fit`."""

    row: int
    label: str
    image: str | None = None
    text: str | None = None
    relation: float | None = None


def write_page(
    report: RelationReport,
    dataset: Any,
    path: str | Path,
    *,
    count: int = 24,
    column: str | None = None,
    dropped: Mapping[int, str] | None = None,
    quiet: bool = False,
) -> Path:
    """Self-contained HTML: facts, the worst labels with their evidence, relation maps, outliers; then all dropped rows.

    Args:
        report: a report with its graph.
        dataset: the fitted dataset.
        path: file to write; the dropped rows come beside it, 100 to a page, in `NAME-dropped-1.html` and so on.
        count: rows shown with evidence, half as many outliers.
        column: what is shown of a row; default the first image column, else the first text column, else nothing.
        dropped: rows that were dropped and why, as `report.dropped` has them; default `report.dropped()`.
        quiet: no progress bar.

    Returns:
        The path.

    Raises:
        ValueError: unknown column, or another dataset than was fitted.

    Cost: one row of the graph, n (d + C) operations, for each row shown with evidence; a small picture a dropped row.
    """
    shown = Shown(report, dataset, column)
    entries = []
    for row in report.worst(count):
        evidence = above_zero(report.evidence(int(row), 4))
        entries.append(
            {
                "item": shown.item(int(row)),
                "score": report.label_noise_score[row],
                "flagged": bool(report.is_label_error[row]),
                "suggested": report.name_of(report.suggested_label[row]),
                "conflicting": shown.items(evidence.conflicting, evidence.conflicting_relations),
                "supporting": shown.items(evidence.supporting, evidence.supporting_relations),
            }
        )
    odd = np.argsort(-report.outlier_score, kind="stable")[: max(1, count // 2)]
    path, gone = Path(path), report.dropped() if dropped is None else dropped
    names = [f"{path.stem}-dropped-{k + 1}.html" for k in range(-(-len(gone) // PAGE))]
    same = {
        "heading": "Dropped rows",
        "title": f"Label report: {report.label_column}",
        "score_name": SCORES[report.config.score][0],
        "links": names,
    }
    first = {"facts": facts(report), "entries": entries, "maps": _maps(report), "outliers": shown.items(odd, None)}
    render(path, **same, **first, dropped=[], total=len(gone), here=path.name, first=path.name)
    rows = list(gone.items())
    for k, name in enumerate(track(names, "Dropped rows", unit="page", disable=quiet)):
        cells = [_dropped(report, shown, row, why) for row, why in rows[k * PAGE : (k + 1) * PAGE]]
        page = {"facts": [], "entries": [], "maps": [], "outliers": [], "dropped": cells}
        render(path.with_name(name), **same, **page, total=len(gone), here=name, first=path.name)
    return path


def above_zero(evidence: Evidence) -> Evidence:
    """Evidence without the relations that would be written as 0.00."""
    against, support = -evidence.conflicting_relations >= LEAST, evidence.supporting_relations >= LEAST
    return replace(
        evidence,
        conflicting=evidence.conflicting[against],
        conflicting_labels=evidence.conflicting_labels[against],
        conflicting_relations=evidence.conflicting_relations[against],
        supporting=evidence.supporting[support],
        supporting_labels=evidence.supporting_labels[support],
        supporting_relations=evidence.supporting_relations[support],
    )


def _dropped(report: RelationReport, shown: Shown, row: int, why: str) -> dict[str, Any]:
    """One cell of the dropped rows; rows go by their numbers in the dataset that was given to `fit`."""
    kind, _, other = why.partition(" of row ")
    suggested = report.name_of(report.other_label[row]) if kind == "label error" else None
    return {
        "item": shown.item(row, size=96),
        "why": f"{kind} of row {report.rows[int(other)]}" if other else kind,
        "score": report.outlier_score[row] if kind == "outlier" else report.label_noise_score[row],
        "suggested": suggested,
    }


@cache
def _template() -> Template:
    """The page's template; compiling it takes longer than filling it in."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render(path: Path, **given: Any) -> None:
    """Fill in the template and write it."""
    path.write_text(_template().render(given), encoding="utf-8")


def draw_worst(
    report: RelationReport, dataset: Any, *, count: int = 8, evidence: int = 5, column: str | None = None
) -> Any:
    """A picture of the worst rows, each beside the rows that contradict it most (Figure 5.10).

    Args:
        report: a report with its graph.
        dataset: the fitted dataset, with an image column.
        count: rows.
        evidence: contradicting rows for each.
        column: the image column; default the first.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: no image column.
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "drawing the worst rows") from error
    shown = Shown(report, dataset, column)
    if not shown.is_image:
        raise ValueError("the dataset has no image column to draw; the HTML page shows texts")
    rows = report.worst(count)
    figure = Figure(figsize=(1.5 * (evidence + 1), 1.75 * len(rows)), layout="constrained")
    figure.suptitle("Red: a label in doubt; beside it the rows that contradict it, and how much", fontsize=9)
    for line, row in enumerate(rows):
        found = above_zero(report.evidence(int(row), evidence))
        cells = [(int(row), None), *zip(found.conflicting, found.conflicting_relations, strict=True)]
        for place, (one, relation) in enumerate(cells):
            axes = figure.add_subplot(len(rows), evidence + 1, line * (evidence + 1) + place + 1)
            picture = shown.value(int(one))
            if picture is not None:
                axes.imshow(np.asarray(picture), cmap="gray")
            axes.set_axis_off()
            name = report.name_of(report.labels[one])
            title = name if relation is None else f"{name} ({relation:+.2f})"
            axes.set_title(title, fontsize=8, color="crimson" if relation is None else "black", parse_math=False)
    return figure


class Shown:
    """What is shown of a row: a thumbnail, a piece of text, or its number only."""

    def __init__(self, report: RelationReport | MultiLabelReport, dataset: Any, column: str | None) -> None:
        from datasets import Image, Value

        if len(dataset) != len(report):
            raise ValueError(f"the dataset has {len(dataset)} rows, the report {len(report)}; give the fitted dataset")
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"no column {column!r} to show; the dataset has {dataset.column_names}")
        features = dataset.features
        kinds = {name: isinstance(feature, Image) for name, feature in features.items()}
        texts = [n for n, f in features.items() if isinstance(f, Value) and f.dtype in ("string", "large_string")]
        texts = [name for name in texts if name != report.label_column]
        self.column = column or next((name for name, image in kinds.items() if image), next(iter(texts), None))
        self.is_image = bool(self.column and kinds.get(self.column))
        self.report, self.numbers = report, report.rows
        self.dataset = dataset if self.column is None else dataset.select_columns([self.column]).with_format(None)
        if self.is_image:
            self.dataset = self.dataset.cast_column(self.column, Image(decode=False))

    def value(self, row: int) -> Any:
        if self.column is None:
            return None
        value = self.dataset[row][self.column]
        if not self.is_image or value is None:
            return value
        try:
            return read_picture(value)
        except ValueError:  # features may be there for a picture that cannot be shown
            return None

    def item(self, row: int, relation: float | None = None, size: int = 192) -> Item:
        value, image, text = self.value(row), None, None
        if self.is_image:
            image = None if value is None else _thumbnail(value, size)
        elif value is not None:
            text = str(value)
            text = text if len(text) <= 220 else text[:217] + "..."
        return Item(int(self.numbers[row]), self.report.label_text(row), image, text, relation)

    def items(self, rows: Any, relations: Any) -> list[Item]:
        values = [None] * len(rows) if relations is None else [float(value) for value in relations]
        return [self.item(int(row), value) for row, value in zip(rows, values, strict=True)]


def _thumbnail(image: Any, size: int) -> str:
    from PIL.Image import Resampling

    small = image.convert("RGB")
    small.thumbnail((size, size))
    if max(small.size) < 96:  # tiny images are enlarged without smoothing
        factor = 96 // max(small.size) + 1
        small = small.resize((small.width * factor, small.height * factor), Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _maps(report: RelationReport) -> list[str]:
    """Relation maps of the worst row, of the best and of the oddest; none without matplotlib."""
    by_score = np.argsort(-report.label_noise_score, kind="stable")
    rows = dict.fromkeys([int(by_score[0]), int(by_score[-1]), int(np.argmax(report.outlier_score))])
    pictures = []
    for row in list(rows)[:MAPS]:
        buffer = io.BytesIO()
        try:
            report.relation_map(row).savefig(buffer, format="png", dpi=110)
        except MissingExtraError:
            return []
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    return pictures
