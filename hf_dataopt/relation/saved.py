"""Reports on disk: scores and the reference set in safetensors, everything else in JSON, read back with every value checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..progress import told
from ..publishing.artifacts import fetch
from ..publishing.record import ABOUT, MINOR, check_version, known_settings
from ..publishing.safe_files import files_of, read_arrays, read_json
from ..publishing.writer import finish, replacing
from ..settings import check_path
from .config import RelationConfig
from .outlier import Reference

logger = logging.getLogger(__name__)

FORMAT = 1
KIND = "relation_report"
UNFINISHED = "unfinished"  # stripes of a run that was killed, in the folder of the report
_JSON, _TENSORS = "report.json", "report.safetensors"
INFINITE = "infinite"
# name -> kind of its numbers
ARRAYS = {
    "labels": "i",
    "label_noise_score": "f",
    "is_label_error": "b",
    "suggested_label": "i",
    "other_label": "i",
    "outlier_score": "f",
    "is_outlier": "b",
    "group": "i",
}
CODES = ("labels", "suggested_label", "other_label")
INTEGERS = (*CODES, "group")


def save_report(
    folder: str | Path,
    about: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    parts: Mapping[str, NDArray[np.float64]],
    reference: Sequence[Reference],
) -> None:
    """Write a report as an artifact.

    Args:
        folder: made if missing; an earlier report in it, and what a killed run left there, is replaced.
        about: settings, columns, labels and summary, ready for JSON.
        arrays: `ARRAYS` by name, (n,) each.
        parts: scores of both kinds.
        reference: one per checkpoint.

    Raises:
        ValueError: values that `load_report` would refuse; what was there before stays.
    """
    from safetensors.numpy import save_file

    found = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    found |= {f"part.{name}": np.ascontiguousarray(values) for name, values in parts.items()}
    for k, one in enumerate(reference):
        found |= {f"reference.{k}.{name}": value for name, value in one.arrays().items()}
    level = about["outlier_level"]  # JSON knows no infinity
    settings = {**about, "outlier_level": INFINITE if level == np.inf else level}
    text = json.dumps({"format": FORMAT, "format_minor": MINOR, **settings}, indent=1)
    with replacing(folder, KIND, besides=(UNFINISHED,)) as draft:
        save_file(found, draft / _TENSORS)
        (draft / _JSON).write_text(text + "\n", encoding="utf-8")
        _checked(read_json(draft / _JSON), read_arrays(draft / _TENSORS), folder)
        flagged = {"rows": len(found["labels"]), "dropped": int(found["is_label_error"].sum())}
        finish(draft, KIND, about=flagged)


def load_report(folder: str | Path) -> dict[str, Any]:
    """What a `RelationReport` is made of.

    Raises:
        ValueError: no report in the folder, a damaged file, values that cannot be, or a newer format.
    """
    folder = check_path("folder", folder)
    try:
        if (folder / ABOUT).is_file() or not folder.is_dir():
            folder, _ = fetch(folder, KIND)
        else:  # written before reports had a record
            files_of(folder)
        return _checked(read_json(folder / _JSON), read_arrays(folder / _TENSORS), folder)
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{folder} holds no readable relation report ({type(error).__name__}: {told(error, 400)}); fit again"
        ) from error


def _checked(about: Mapping[str, Any], arrays: dict[str, NDArray[Any]], folder: str | Path) -> dict[str, Any]:
    newer = check_version(about, Path(folder) / _JSON, "format")
    if newer:
        arrays = {
            name: one for name, one in arrays.items() if name in ARRAYS or name.startswith(("part.", "reference."))
        }
    columns = [_pair(one) for one in _list(about, "columns")]
    if not columns:
        raise ValueError("it names no columns")
    values, names = _list(about, "label_values"), _list(about, "label_names")
    if len(values) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{len(values)} labels with {len(names)} names")
    level, summary = about["outlier_level"], about["summary"]
    level = np.inf if level == INFINITE else level
    if isinstance(level, bool) or not isinstance(level, int | float) or not level > -np.inf:
        raise ValueError(f"outlier_level is {level!r:.40}")
    if not isinstance(about["label_column"], str) or not isinstance(summary, dict):
        raise ValueError("label_column or summary is of the wrong kind")
    parts = {name[5:]: values for name, values in arrays.items() if name.startswith("part.")}
    rows = len(arrays["labels"])
    # reports of the first minor format had neither
    arrays = {"other_label": arrays["suggested_label"], "group": np.arange(rows), **arrays}
    for name, kind in {**ARRAYS, **{f"part.{name}": "f" for name in parts}}.items():
        one = arrays[name]
        if one.shape != (rows,) or one.dtype.kind != kind:
            raise ValueError(f"{name} is {one.dtype} {one.shape}, needed is one of kind {kind!r} per row ({rows})")
        # outlier scores may be infinite: nothing is similar, and epsilon was 0
        if kind == "f" and np.isnan(one).any() or (name != "outlier_score" and kind == "f" and np.isinf(one).any()):
            raise ValueError(f"{name} holds NaN or infinite values")
        least, most = (0, rows) if name == "group" else (-1, len(names))
        if kind == "i" and rows and not least <= one.min() <= one.max() < most:
            raise ValueError(f"{name} holds numbers from {one.min()} to {one.max()}, {least} to {most - 1} are there")
    reference = [Reference.from_arrays(arrays, k, *names) for k, names in enumerate(columns)]
    for held in reference:
        _check_reference(held)
    if {name for name in arrays if not name.startswith(("part.", "reference."))} != set(ARRAYS):
        raise ValueError(f"unexpected arrays among {sorted(arrays)!r:.200}")
    text = known_settings(about["config"], (one.name for one in fields(RelationConfig)), newer)
    return {
        "config": placed(RelationConfig.from_json_string(text)),
        "label_column": about["label_column"],
        "columns": columns,
        "label_values": values,
        "label_names": names,
        "outlier_level": float(level),
        "parts": parts,
        "about": summary,
        "reference": reference,
        **{name: arrays[name] for name in ARRAYS},
    }


def placed(config: RelationConfig) -> RelationConfig:
    """Settings for new rows on this machine: without the device of another one."""
    import torch

    if config.device is None:
        return config
    try:
        device = torch.device(config.device)
    except RuntimeError:
        device = torch.device("meta")
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device.type == "cpu" or (
        here is not None and device.type == here.type and (device.index or 0) < torch.accelerator.device_count()
    ):
        return config
    logger.info("this machine has no device %r; new rows are scored on the default one", config.device)
    return replace(config, device=None)


def _check_reference(held: Reference) -> None:
    """What new rows can be compared with: features with a direction, and probabilities."""
    for name, matrix in held.arrays().items():
        if matrix.ndim != 2 or matrix.dtype != np.float32 or not np.isfinite(matrix).all():
            raise ValueError(f"the reference {name} are {matrix.dtype} {matrix.shape}, or not finite")
        if len(matrix) != len(held.features):
            raise ValueError(f"the reference has {len(held.features)} rows and {len(matrix)} {name}")
    squares = np.einsum("ij,ij->i", held.features, held.features, dtype=np.float32)
    if not (np.isfinite(squares) & (squares > 0)).all():
        raise ValueError("the reference features have rows without a direction")
    if held.probs is not None and len(held.probs):
        total = held.probs.sum(axis=1)
        if held.probs.min() < 0 or not (np.abs(total - 1) < 0.02).all():
            raise ValueError("the reference probs are no probabilities")


def _list(about: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(about[name], list):
        raise ValueError(f"{name} must be a list, got a {type(about[name]).__name__}")
    return list(about[name])


def _pair(names: Any) -> tuple[str, str]:
    if not isinstance(names, list) or len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise ValueError(f"columns must be pairs of names, got {names!r:.80}")
    return names[0], names[1]
