"""Detection metrics of chapter 5: average precision, AUROC, TNR at 95 % TPR. Plain functions, and `evaluate` modules.

Scores point up (higher = more suspicious) and labels are 1 for what is to be found: a label error, an outlier. The
functions need numpy only. `module_path("auroc")` is a folder that ships in the wheel, so

    evaluate.load(module_path("auroc")).compute(references=labels, predictions=scores)

loads without network; `evaluate.combine` accepts what it returns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .settings import check_choice, check_number, numbers

METRIC_NAMES = ("average_precision", "auroc", "tnr_at_tpr")


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the precision-recall steps: the sum of (recall gained) x (precision) over distinct scores.

    Args:
        labels: (n,) bool or 0/1; 1 marks what is to be found. At least one 1.
        scores: (n,) finite or infinite numbers without NaN, higher is more suspicious. Ties enter together.

    Returns:
        In (0, 1]; a constant score gives the share of positives.

    Raises:
        ValueError: different lengths, labels other than 0 and 1, NaN, or no positive.

    Source: Table 5.1 (AP). Cost: one sort.

    Example:
        >>> average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.8333333333333333
    """
    found, false = _counts(labels, scores, need_negatives=False)
    precision = found / (found + false)
    return float(np.sum(np.diff(found, prepend=0.0) / found[-1] * precision))


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half.

    Args:
        labels: (n,) bool or 0/1 with both values present.
        scores: (n,) numbers without NaN, higher is more suspicious.

    Returns:
        In [0, 1]; 0.5 for a constant score.

    Raises:
        ValueError: as `average_precision`, and when there is no negative.

    Source: Table 5.1 (AUROC). Cost: one sort.

    Example:
        >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    found, false = _counts(labels, scores)
    tpr = np.concatenate([[0.0], found / found[-1]])
    fpr = np.concatenate([[0.0], false / false[-1]])
    return float(np.trapezoid(tpr, fpr))


def tnr_at_tpr(labels: ArrayLike, scores: ArrayLike, tpr: float = 0.95) -> float:
    """True-negative rate at the first threshold, from the top, whose true-positive rate reaches `tpr`.

    Args:
        labels: (n,) bool or 0/1 with both values present.
        scores: (n,) numbers without NaN, higher is more suspicious.
        tpr: Wanted share of positives found, in (0, 1]. Default 0.95 (TNR95).

    Returns:
        In [0, 1].

    Raises:
        ValueError: as `auroc`, and for `tpr` outside (0, 1].

    Source: Table 5.1 (TNR95). Cost: one sort.

    Example:
        >>> tnr_at_tpr([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.5
    """
    tpr = check_number("tpr", tpr, 0, 1, above=True, todo="it is a share of positives, such as 0.95")
    found, false = _counts(labels, scores)
    first = int(np.argmax(found / found[-1] >= tpr))
    return float(1 - false[first] / false[-1])


def detection_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """The three figures of the chapter's tables in one dictionary: `ap`, `auroc`, `tnr95`.

    Example:
        >>> detection_metrics([0, 1], [0.0, 1.0])
        {'ap': 1.0, 'auroc': 1.0, 'tnr95': 1.0}
    """
    return {
        "ap": average_precision(labels, scores),
        "auroc": auroc(labels, scores),
        "tnr95": tnr_at_tpr(labels, scores),
    }


def module_path(name: str) -> str:
    """Folder of one of the three metrics for `evaluate.load`; it ships in the wheel and needs no network.

    Args:
        name: "average_precision", "auroc" or "tnr_at_tpr".

    Returns:
        An absolute path.

    Raises:
        ValueError: unknown name.
    """
    check_choice("name", name, METRIC_NAMES)
    return str(Path(__file__).resolve().parent / "evaluate_modules" / name)


def _counts(
    labels: ArrayLike, scores: ArrayLike, need_negatives: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positives and negatives at or above each distinct score, from the highest score down."""
    wanted, values = numbers("labels", labels, kinds="fiub"), numbers("scores", scores)
    if wanted.ndim != 1 or wanted.shape != values.shape:
        raise ValueError(f"labels have shape {wanted.shape}, scores {values.shape}; give two flat arrays of one length")
    if not np.isin(wanted, (0, 1)).all():
        raise ValueError(
            f"labels hold {np.unique(wanted)[:5].tolist()}; give 1 for what is to be found and 0 otherwise"
        )
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} scores are NaN; drop those rows or give them a number")
    wanted = wanted.astype(bool)
    if not wanted.any() or (need_negatives and wanted.all()):
        raise ValueError(f"{int(wanted.sum())} of {wanted.size} labels are 1; both kinds are needed to rank them")
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), values.size - 1)
    found = np.cumsum(wanted[order])[last].astype(np.float64)
    return found, last + 1 - found
