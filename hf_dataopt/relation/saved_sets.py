"""Reports of several labels a row on disk: decisions and scores in safetensors, everything else in JSON, checked when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..progress import told
from ..publishing.artifacts import fetch
from ..publishing.record import MINOR, check_version, known_settings
from ..publishing.safe_files import read_arrays, read_json
from ..publishing.writer import finish, replacing
from .config import RelationConfig
from .saved import INFINITE, placed

FORMAT = 1
KIND = "multi_label_report"
_JSON, _TENSORS = "report.json", "report.safetensors"
# name -> kind of number, and whether there is one a label
SCORES_OF_SETS = {
    "given": ("int8", True),
    "label_noise_score": ("float32", True),
    "is_label_error": ("bool", True),
    "outlier_score": ("float64", False),
    "is_outlier": ("bool", False),
    "group": ("int64", False),
}
_ABOUT = {"label_column": str, "label_values": list, "label_names": list, "hot": bool, "outlier_level": float}


def save_sets(folder: Path, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a report as an artifact.

    Args:
        folder: made if missing; an earlier report in it is replaced.
        about: settings and labels, ready for JSON.
        arrays: `SCORES_OF_SETS` by name.

    Raises:
        ValueError: values that `load_sets` would refuse; what was there before stays.
    """
    from safetensors.numpy import save_file

    level = about["outlier_level"]  # JSON knows no infinity
    settings = {**about, "outlier_level": INFINITE if level == np.inf else level}
    text = json.dumps({"format": FORMAT, "format_minor": MINOR, **settings}, indent=1)
    with replacing(folder, KIND) as draft:
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, draft / _TENSORS)
        (draft / _JSON).write_text(text + "\n", encoding="utf-8")
        _checked(read_json(draft / _JSON), read_arrays(draft / _TENSORS), folder)
        flagged = int(arrays["is_label_error"].any(axis=1).sum())
        finish(draft, KIND, about={"rows": len(arrays["group"]), "dropped": flagged})


def load_sets(folder: Path) -> dict[str, Any]:
    """What a `MultiLabelReport` is made of: settings, labels and arrays.

    Raises:
        ValueError: no such report in the folder, a damaged file, values that cannot be, or a newer format.
    """
    try:
        folder, _ = fetch(folder, KIND)
        return _checked(read_json(folder / _JSON), read_arrays(folder / _TENSORS), folder)
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{folder} holds no readable report of several labels a row ({type(error).__name__}: {told(error, 400)}); fit again"
        ) from error


def _checked(about: dict[str, Any], arrays: dict[str, NDArray[Any]], folder: Path) -> dict[str, Any]:
    newer = check_version(about, folder / _JSON, "format")
    if about["outlier_level"] == INFINITE:
        about = {**about, "outlier_level": np.inf}
    for name, sort in _ABOUT.items():
        if not isinstance(about[name], sort):
            raise ValueError(f"{name} is {about[name]!r:.40}, no {sort.__name__}")
    names, count = about["label_names"], len(arrays["group"])
    if len(about["label_values"]) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{len(about['label_values'])} labels with {len(names)} names")
    for name, (kind, each) in SCORES_OF_SETS.items():
        one, shape = arrays[name], (count, len(names)) if each else (count,)
        if one.dtype != kind or one.shape != shape:
            raise ValueError(f"{name} is {one.dtype} {one.shape}, needed is {kind} {shape}")
        if one.dtype.kind == "f" and np.isnan(one).any():
            raise ValueError(f"{name} holds NaN")
    if set(arrays) != set(SCORES_OF_SETS) and not newer:
        raise ValueError(f"unexpected arrays among {sorted(arrays)!r:.200}")
    least = {"given": (-1, 1), "label_noise_score": (0, 1), "group": (0, count - 1)}
    for name, (low, high) in least.items():
        if arrays[name].size and not low <= arrays[name].min() <= arrays[name].max() <= high:
            raise ValueError(f"{name} holds numbers outside {low} to {high}")
    text = known_settings(about["config"], (one.name for one in fields(RelationConfig)), newer)
    found = {name: about[name] for name in _ABOUT} | {"config": placed(RelationConfig.from_json_string(text))}
    return found | {name: arrays[name] for name in SCORES_OF_SETS}
