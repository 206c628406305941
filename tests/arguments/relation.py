"""The relation graph: cleaner, report, scores and what they are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from hf_dataopt import (
    RelationCleaner,
    RelationConfig,
    RelationReport,
    clean_stream,
    consensus_labels,
    out_of_sample_probs,
)
from hf_dataopt.errors import FolderInUseError, MissingExtraError
from hf_dataopt.relation import baselines
from hf_dataopt.relation.graph import RelationGraph
from hf_dataopt.relation.kernel import relation
from hf_dataopt.relation.label_noise import find_label_noise, single_node_label_noise
from hf_dataopt.relation.multi_label import MultiLabelReport
from hf_dataopt.relation.outlier import is_outlier, outlier_scores
from hf_dataopt.relation.relation_map import draw_relation_map
from hf_dataopt.relation.rows import Rows, rows_of

from ..relation.data import make
from .pool import (
    ANY,
    FLAG,
    NONE,
    PATH,
    TEXT,
    UNCALLED,
    WORDS,
    Argument,
    Case,
    Kind,
    choice,
    count,
    instance,
    like,
    number,
    saved,
    spoiled,
)

NAN, INF = float("nan"), float("inf")


@lru_cache(maxsize=1)
def _data() -> Dataset:
    return make(60, d=6, classes=3).dataset()


def data() -> Dataset:
    """The fitted data set."""
    return _data()


@lru_cache(maxsize=1)
def _fitted() -> RelationReport:
    return RelationCleaner(temperature=2).fit(data(), quiet=True)


def report() -> RelationReport:
    """A report of its own for each call."""
    return replace(_fitted(), _graphs=_fitted()._graphs)


def _voted() -> Dataset:
    return data().add_column("ann", data()["label"][:]).add_column("bo", [-1, *data()["label"][1:]])


def _column(name: str, value: Any) -> Dataset:
    rows = data().to_dict()
    rows[name] = [value if k == 7 else one for k, one in enumerate(rows[name])]
    return Dataset.from_dict(rows)


def _dataset(value: Any) -> bool | None:
    return None if isinstance(value, Dataset) else False


SPOILED = [
    lambda: _column("features", [NAN] * 6),
    lambda: _column("features", [0.0] * 6),
    lambda: _column("features", None),
    lambda: _column("features", [1.0]),
    lambda: _column("probs", [0.9, 0.9, 0.9]),
    lambda: _column("probs", [NAN, 0.5, 0.5]),
    lambda: _column("probs", [-1.0, 1.0, 1.0]),
    lambda: _column("label", -2),
    lambda: data().remove_columns("probs"),
    lambda: data().select([]),
    lambda: data().map(lambda row: {"label": 1}),
    lambda: DatasetDict({"train": data()}),
    lambda: data().to_iterable_dataset(),
    lambda: data().to_dict(),
]
DATASET = Argument(data, Kind(_dataset, SPOILED))


@lru_cache(maxsize=1)
def _tags() -> Dataset:
    return data().add_column(
        "tags",
        [
            [label] if row % 3 else [label, 2 - label] if label != 1 else []
            for row, label in enumerate(data()["label"][:])
        ],
    )


def tagged() -> Dataset:
    """The fitted data set with several labels a row."""
    return _tags()


@lru_cache(maxsize=1)
def _tagged_report() -> MultiLabelReport:
    return RelationCleaner().fit_multi_label(tagged(), "tags", quiet=True)


def _other_tags(value: Any) -> Dataset:
    rows = tagged().to_dict()
    rows["tags"] = [value if k == 7 else one for k, one in enumerate(rows["tags"])]
    return Dataset.from_dict(rows)


def _texts(value: Any) -> bool | None:
    return None if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value) else False


SPOILED_TAGS = [lambda: _other_tags([1, 1]), lambda: _other_tags([3]), lambda: _other_tags([-1])]
TAGGED = Argument(tagged, Kind(_dataset, [data, lambda: tagged().select(range(5)), lambda: tagged().shuffle(seed=1)]))


def never(*bad: Any) -> Kind:
    """Nothing else will do."""
    return Kind(lambda value: False, bad)


def columns(value: Any) -> bool | None:
    """A name, or several."""
    if isinstance(value, str):
        return None
    return None if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value) else False


COLUMNS = Kind(columns, [lambda: ["features"] * 2, lambda: ["features", 1], lambda: "label"])


def _level(value: Any) -> bool | None:
    return None if isinstance(value, int | float | np.generic | np.ndarray | torch.Tensor) else False


def two() -> torch.Tensor:
    """Two rows."""
    return torch.eye(2)


def _graph(rows: int = 60, width: int = 6, config: RelationConfig | None = None) -> RelationGraph:
    made = make(rows, d=width, classes=3)
    features, probs = (rows_of(one, "rows") for one in (made.features, made.probs))
    return RelationGraph(features, probs, np.asarray(made.labels), config or RelationConfig())


GRAPH = Argument(_graph, instance(RelationGraph, near=[lambda: RelationGraph, data]))
NUMBERED = Kind(
    lambda value: None if isinstance(value, list | tuple | range | np.ndarray | torch.Tensor) else False,
    [
        lambda: [60],
        lambda: [-1],
        lambda: np.array([0.0]),
        lambda: np.array([[1]]),
        lambda: [True],
        list,
        lambda: torch.tensor([70]),
    ],
)


ROWS = like(two, more=spoiled(two, NAN, 0.0))
PAIRS = never(lambda: (torch.arange(2),), two)


def _whole(value: Any, rows: int) -> bool | None:
    """Row labels."""
    try:
        found = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return False
    return None if found.shape == (rows,) and found.dtype.kind in "iu" else False


def _centre(value: Any, width: int) -> bool | None:
    try:
        found = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return False
    return None if found.shape == (width,) and found.dtype.kind == "f" and bool(np.isfinite(found).all()) else False


def floats(shape: tuple[int, ...], *bad: Any, seed: int = 0, integers: bool = False) -> Argument:
    """An array of a shape, or lists."""
    made = np.random.default_rng(seed).normal(size=shape)

    def takes(value: Any) -> bool | None:
        try:
            found = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            return False
        return (
            None
            if found.ndim == len(shape) and found.dtype.kind in ("iu" if integers else "fiu") and found.size
            else False
        )

    odd = [lambda v=v: np.where(np.arange(made.size).reshape(shape) == 1, v, made) for v in (NAN, INF)]
    more = [lambda: made[None], lambda: made[0], lambda: made[:0], lambda: made.astype(str), lambda: made + 1j]
    return Argument(lambda: made.copy(), Kind(takes, [*odd, *more, *bad]))


def probs(rows: int = 6, classes: int = 3) -> Argument:
    """Rows of probabilities."""
    made = np.full((rows, classes), 1 / classes, np.float32)
    bad = [lambda: made * 2, lambda: made * NAN, lambda: -made, lambda: made[:, :0], lambda: np.ones((rows, classes))]

    def takes(value: Any) -> bool | None:
        try:
            found = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            return False
        if found.ndim != 2 or found.dtype.kind not in "fiu" or not found.size:
            return False
        return None if (found >= 0).all() and (abs(found.sum(1) - 1) <= 0.02).all() else False

    return Argument(lambda: made.copy(), Kind(takes, bad))


def labels(rows: int = 6, classes: int = 3) -> Argument:
    """Class numbers."""
    made = np.arange(rows) % classes
    bad = [lambda: made + 1, lambda: made - 1, lambda: made.astype(float), lambda: made[:-1], lambda: made[None]]

    def takes(value: Any) -> bool | None:
        try:
            found = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            return False
        fits = found.shape == (rows,) and found.dtype.kind in "iu" and found.min() >= 0 and found.max() < classes
        return None if fits else False

    return Argument(lambda: made.copy(), Kind(takes, bad))


def _sixty(value: Any) -> bool | None:
    """A value for each of sixty rows."""
    try:
        return None if not isinstance(value, str | bytes) and len(value) == 60 else False
    except TypeError:
        return False


def _of(**arguments: Argument) -> dict[str, Argument]:
    return arguments


def _int(value: int, least: int, most: int = 2**31 - 1) -> Argument:
    return Argument(lambda: value, count(least, most))


def cases() -> dict[str, Case]:
    """All of the room."""
    matrix = lambda seed=0: floats((6, 4), seed=seed)  # noqa: E731
    batch = Kind(
        lambda value: None if isinstance(value, Mapping) else False, [lambda: {"label": [0]}, lambda: {"label": None}]
    )
    indices = Kind(
        lambda value: None if isinstance(value, list | tuple | range | np.ndarray | torch.Tensor) else False,
        [lambda: [60], lambda: [-1], lambda: [0.5], lambda: ["a"], lambda: [True], lambda: [[0]]],
    )
    folder = _of(folder=Argument(lambda: "report", PATH))
    share = Argument(lambda: None, NONE | number(0, 1))
    fields = {name: Argument(lambda v=v: v, never()) for name, v in vars(_fitted()).items() if not name.startswith("_")}
    fields["label_column"].kind = WORDS
    fields["outlier_level"].kind = Kind(_level)
    for name in ("columns", "label_values", "label_names", "reference"):
        fields[name].kind = instance(list)
    for name in ("parts", "about"):
        fields[name].kind = instance(dict)
    found = {
        "RelationCleaner": Case(
            RelationCleaner,
            _of(config=Argument(RelationConfig, NONE | instance(RelationConfig))),
        ),
        "RelationCleaner.fit": Case(
            RelationCleaner(temperature=2).fit,
            _of(
                dataset=DATASET,
                label_column=Argument(lambda: "label", WORDS),
                features_column=Argument(lambda: "features", COLUMNS),
                probs_column=Argument(lambda: "probs", COLUMNS),
                output_dir=Argument(lambda: None, NONE | PATH),
                on_error=Argument(lambda: "raise", choice("raise", "skip")),
                quiet=Argument(lambda: True, FLAG),
            ),
            (FolderInUseError,),
        ),
        "RelationCleaner.fit_multi_label": Case(
            RelationCleaner().fit_multi_label,
            _of(
                dataset=Argument(tagged, Kind(_dataset, [*SPOILED, data, *SPOILED_TAGS])),
                label_column=Argument(lambda: "tags", WORDS),
                features_column=Argument(lambda: "features", WORDS),
                probs_column=Argument(lambda: "probs", NONE | WORDS),
                label_names=Argument(
                    lambda: ["red", "round", "old"],
                    NONE | Kind(_texts, [lambda: ["red"], lambda: ["red", 1, "old"], lambda: "red", list]),
                ),
                quiet=Argument(lambda: True, FLAG),
            ),
        ),
        "MultiLabelReport.annotate": Case(
            lambda **a: _tagged_report().annotate(**a),
            _of(batch=Argument(dict, ANY), indices=Argument(lambda: [0, 1], indices)),
        ),
        "MultiLabelReport.review": Case(lambda **a: _tagged_report().review(**a), _of(count=_int(3, 1))),
        "MultiLabelReport.relabel": Case(
            lambda **a: _tagged_report().relabel(**a),
            _of(dataset=TAGGED, given_column=Argument(lambda: "before", WORDS)),
        ),
        "MultiLabelReport.filter": Case(
            lambda **a: _tagged_report().filter(**a),
            _of(dataset=TAGGED)
            | _of(**{name: Argument(lambda: True, FLAG) for name in ("label_errors", "outliers", "near_duplicates")}),
        ),
        "MultiLabelReport.dropped": Case(
            lambda **a: _tagged_report().dropped(**a),
            _of(**{name: Argument(lambda: True, FLAG) for name in ("label_errors", "outliers", "near_duplicates")}),
        ),
        "MultiLabelReport.label_text": Case(lambda **a: _tagged_report().label_text(**a), _of(row=_int(3, 0, 59))),
        "MultiLabelReport.save": Case(lambda **a: _tagged_report().save(**a), folder),
        "MultiLabelReport.load": Case(_load_tagged, _of(folder=Argument(lambda: "saved", PATH))),
        "RelationReport.label_text": Case(lambda **a: report().label_text(**a), _of(row=_int(3, 0, 59))),
        "RelationReport": Case(RelationReport, fields),
        "RelationReport.fitted": Case(lambda **a: report().fitted(**a), _of(dataset=Argument(data, Kind(_dataset)))),
        "RelationReport.annotate": Case(
            lambda **a: report().annotate(**a),
            _of(
                batch=Argument(lambda: {"label": data()["label"][:2]}, batch), indices=Argument(lambda: [0, 1], indices)
            ),
        ),
        "RelationReport.filter": Case(
            lambda **a: report().filter(**a),
            _of(
                dataset=Argument(
                    data, Kind(_dataset, [lambda: data().select(range(5)), lambda: data().shuffle(seed=1)])
                ),
                label_errors=Argument(lambda: True, FLAG),
                outliers=Argument(lambda: False, FLAG),
                near_duplicates=Argument(lambda: False, FLAG),
            ),
        ),
        "RelationReport.dropped": Case(
            lambda **a: report().dropped(**a),
            _of(**{name: Argument(lambda: True, FLAG) for name in ("label_errors", "outliers", "near_duplicates")}),
        ),
        "RelationReport.relabel": Case(
            lambda **a: report().relabel(**a),
            _of(
                dataset=Argument(
                    data, Kind(_dataset, [lambda: data().select(range(5)), lambda: data().shuffle(seed=1)])
                ),
                rows=Argument(lambda: [3], NONE | NUMBERED),
                given_column=Argument(lambda: "before", WORDS),
            ),
        ),
        "RelationReport.summary": Case(lambda **a: report().summary(**a), {}),
        "RelationReport.confusion": Case(lambda **a: report().confusion(**a), {}),
        "RelationReport.review": Case(lambda **a: report().review(**a), _of(count=_int(5, 1))),
        "RelationReport.near_duplicates": Case(
            lambda **a: report().near_duplicates(**a),
            _of(
                across=Argument(
                    lambda: ["train", "test"] * 30, NONE | Kind(_sixty, [lambda: "train" * 12, lambda: [1]])
                )
            ),
        ),
        "RelationReport.name_of": Case(lambda **a: report().name_of(**a), _of(code=_int(1, -1, 2))),
        "RelationReport.rethreshold": Case(
            lambda **a: report().rethreshold(**a),
            _of(
                noise_rate=share,
                threshold=Argument(lambda: None, NONE | number(0, 1.7e308)),
                quantile=Argument(lambda: 0.9, NONE | number(0.5, 1)),
                outlier_share=Argument(lambda: 0.1, NONE | number(0, 1, below=True)),
                outlier_threshold=Argument(lambda: None, NONE | number(-1.7e308, 1.7e308)),
            ),
        ),
        "RelationReport.worst": Case(lambda **a: report().worst(**a), _of(count=_int(5, 1))),
        "RelationReport.evidence": Case(lambda **a: report().evidence(**a), _of(row=_int(5, 0, 59), count=_int(2, 1))),
        "RelationReport.relation_map": Case(
            lambda **a: report().relation_map(**a),
            _of(row=_int(5, 0, 59), max_points=_int(20, 2)),
            (MissingExtraError,),
        ),
        "RelationReport.score_outliers": Case(
            lambda **a: report().score_outliers(**a),
            _of(
                data=Argument(
                    data,
                    Kind(
                        lambda value: None if isinstance(value, Mapping) or hasattr(value, "column_names") else False,
                        [
                            *SPOILED[:7],
                            lambda: {"features": [[1.0]], "probs": [[1.0]]},
                            lambda: {"features": 3, "probs": 4},
                        ],
                    ),
                ),
                quiet=Argument(lambda: True, FLAG),
            ),
        ),
        "RelationReport.attach": Case(
            lambda **a: report().attach(**a),
            _of(graphs=Argument(lambda: _fitted()._graphs, never(list, lambda: [None]))),
        ),
        "RelationReport.save": Case(lambda **a: report().save(**a), folder),
        "RelationReport.load": Case(
            _load, {"folder": Argument(lambda: "saved", PATH), "dataset": Argument(data, NONE | DATASET.kind)}
        ),
        "relation": Case(
            relation,
            _of(
                features_i=Argument(lambda: torch.eye(2), ROWS),
                features_j=Argument(lambda: torch.eye(2), ROWS),
                probs_i=Argument(two, NONE | like(two, loose=True)),
                probs_j=Argument(two, NONE | like(two, loose=True)),
                labels=Argument(lambda: (torch.arange(2), torch.arange(2)), NONE | PAIRS),
                config=Argument(RelationConfig, NONE | instance(RelationConfig)),
            ),
        ),
        "find_label_noise": Case(
            find_label_noise,
            _of(
                initial=floats((6,)),
                subset_sums=Argument(lambda: lambda rows: np.zeros(6), UNCALLED),
                config=Argument(RelationConfig, NONE | instance(RelationConfig)),
            ),
        ),
        "single_node_label_noise": Case(
            single_node_label_noise,
            _of(
                initial=floats((6,)),
                row=Argument(lambda: lambda i: np.zeros(6), UNCALLED),
                threshold=Argument(lambda: 10.0, number(0, 1.7e308)),
                max_moves=Argument(lambda: 5, NONE | count(0)),
                most=Argument(lambda: 3, NONE | count(0)),
            ),
        ),
        "RelationGraph": Case(
            RelationGraph,
            _of(
                features=Argument(lambda: rows_of(np.eye(4), "features"), instance(Rows, near=[lambda: np.eye(4)])),
                probs=Argument(lambda: rows_of(np.eye(4), "probs"), NONE | instance(Rows, near=[lambda: np.eye(4)])),
                labels=Argument(
                    lambda: np.arange(4),
                    NONE | Kind(lambda v: _whole(v, 4), [lambda: np.arange(3), lambda: np.ones(4), lambda: ["a"] * 4]),
                ),
                config=Argument(RelationConfig, instance(RelationConfig, near=[dict, lambda: RelationConfig])),
                centre=Argument(
                    lambda: None, NONE | Kind(lambda v: _centre(v, 4), [lambda: np.ones(3), lambda: [NAN] * 4])
                ),
            ),
        ),
        "RelationGraph.row": Case(
            lambda **a: _graph(8).row(**a),
            _of(
                i=Argument(lambda: 3, count(0, 7)),
                temperature=Argument(lambda: 1.0, NONE | number(0, 1.7e308, above=True)),
            ),
        ),
        "outlier_scores": Case(
            outlier_scores,
            _of(
                graph=GRAPH,
                reference=Argument(lambda: np.arange(5), NUMBERED),
                queries=Argument(lambda: None, NONE | instance(RelationGraph, near=[lambda: _graph(9, 5), data])),
                checkpoint=Argument(lambda: None, NONE),
                quiet=Argument(lambda: True, FLAG),
                alone=Argument(lambda: True, FLAG),
            ),
        ),
        "draw_relation_map": Case(
            draw_relation_map,
            _of(
                graphs=Argument(
                    lambda: [_graph(), _graph()],
                    Kind(
                        lambda value: None if isinstance(value, list | tuple) else False,
                        [list, _graph, lambda: [_graph(), _graph(40)], lambda: [_graph(), None]],
                    ),
                ),
                row=Argument(lambda: 3, count(0, 59)),
                title=Argument(lambda: "a row", TEXT),
                max_points=Argument(lambda: 20, count(2)),
            ),
            (MissingExtraError,),
        ),
        "out_of_sample_probs": Case(
            out_of_sample_probs,
            _of(
                dataset=DATASET,
                label_column=Argument(lambda: "label", WORDS),
                features_column=Argument(lambda: "features", WORDS),
                probs_column=Argument(lambda: "out", WORDS),
                folds=_int(2, 2),
                groups=Argument(
                    lambda: None,
                    NONE
                    | Kind(
                        lambda v: None if isinstance(v, str) and v == "copies" or _whole(v, 60) is None else False,
                        [lambda: "none", lambda: [1]],
                    ),
                ),
                strength=Argument(lambda: 0.1, NONE | number(0, 1.7e308, above=True)),
                seed=_int(0, 0),
                on_error=Argument(lambda: "raise", choice("raise", "skip")),
                quiet=Argument(lambda: True, FLAG),
            ),
        ),
        "clean_stream": Case(
            clean_stream,
            _of(
                stream=Argument(
                    lambda: data().to_iterable_dataset(),
                    Kind(
                        lambda v: None if isinstance(v, IterableDataset) else False,
                        [data, lambda: data().to_dict(), lambda: data().to_iterable_dataset().take(0)],
                    ),
                ),
                label_column=Argument(lambda: "label", WORDS),
                features_column=Argument(lambda: "features", WORDS),
                probs_column=Argument(lambda: "probs", WORDS),
                drop=Argument(
                    lambda: ["label errors"],
                    Kind(
                        lambda v: None if isinstance(v, list | tuple) and not v else False,
                        [lambda: "outliers", lambda: ["errors"], lambda: [1], lambda: {"outliers"}],
                    ),
                ),
                on_error=Argument(lambda: "raise", choice("raise", "skip")),
                config=Argument(lambda: None, NONE | instance(RelationConfig)),
            ),
        ),
        "consensus_labels": Case(
            consensus_labels,
            _of(
                dataset=Argument(_voted, Kind(_dataset, [data, lambda: data().to_dict()])),
                annotator_columns=Argument(
                    lambda: ["ann", "bo"],
                    Kind(
                        lambda v: (
                            None if isinstance(v, list | tuple) and all(isinstance(one, str) for one in v) else False
                        ),
                        [lambda: ["ann"], lambda: ["ann", "ann"], lambda: ["ann", "features"], lambda: ["ann", 1]],
                    ),
                ),
                label_column=Argument(lambda: "consensus", WORDS),
                probability_column=Argument(lambda: "sure", WORDS),
                probs_column=Argument(lambda: "probs", NONE | WORDS),
            ),
        ),
        "is_outlier": Case(is_outlier, _of(scores=floats((6,)), share=Argument(lambda: 0.1, number(0, 1, below=True)))),
    }
    for name in ("loss", "margin", "cwe", "jensen_shannon"):
        found[f"baselines.{name}"] = Case(getattr(baselines, name), _of(probs=probs(), labels=labels()))
    for name in ("entropy", "least_confidence"):
        found[f"baselines.{name}"] = Case(getattr(baselines, name), _of(probs=probs()))
    for name in ("max_softmax", "max_logit", "energy"):
        found[f"baselines.{name}"] = Case(getattr(baselines, name), _of(logits=matrix()))
    found |= {
        "baselines.tracin": Case(baselines.tracin, _of(features=matrix(), probs=probs(), labels=labels())),
        "baselines.react_threshold": Case(
            baselines.react_threshold, _of(train_features=matrix(), percentile=Argument(lambda: 90.0, number(0, 100)))
        ),
        "baselines.react": Case(
            baselines.react,
            _of(
                features=matrix(),
                weight=floats((3, 4)),
                bias=floats((3,)),
                threshold=Argument(lambda: 1.0, number(-1.7e308, 1.7e308)),
            ),
        ),
        "baselines.mahalanobis": Case(
            baselines.mahalanobis,
            _of(
                features=matrix(),
                train_features=matrix(1),
                train_labels=Argument(lambda: np.arange(6) % 2, labels(6, 2).kind | ANY),
                tied=Argument(lambda: False, FLAG),
                ridge=Argument(lambda: 1e-3, number(0, 1.7e308, above=True)),
            ),
        ),
        "baselines.kl_matching": Case(baselines.kl_matching, _of(probs=probs(), train_probs=probs())),
        "baselines.knn": Case(baselines.knn, _of(features=matrix(), train_features=matrix(1), k=_int(2, 0, 5))),
    }
    return found


def _load_tagged(folder: Any) -> Any:
    saved("tagged report", _tagged_report().save)
    return MultiLabelReport.load(folder)


def _load(folder: Any, dataset: Any) -> Any:
    saved("report", report().save)
    return RelationReport.load(folder, dataset)
