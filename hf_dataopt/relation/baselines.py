"""The unary scores that chapter 5's tables compare with: label errors from `probs`, outliers from features and logits.

Every function maps arrays over n rows to one number per row, **higher = more suspicious**. numpy only, except
`local_outlier_factor` (scikit-learn). Not part of the method: small, so that a table can be made anywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError
from ..settings import check_array, check_flag, check_int, check_number, numbers

Array = NDArray[Any]
EPS = 1e-6  # the reference code's, inside logarithms and quotients


def loss(probs: Array, labels: Array) -> Array:
    """Cross-entropy `-log(p_y + 1e-6)`. Source: Table 5.1 "Loss"; cleanlab's self-confidence in another unit.

    Args:
        probs: (n, C) class probabilities.
        labels: (n,) integer labels in [0, C).
    """
    return -np.log(_own(probs, labels) + EPS)


def margin(probs: Array, labels: Array) -> Array:
    """Best other class minus own class, `max_{k != y} p_k - p_y`, in [-1, 1]. Source: Table 5.1 "Margin"."""
    own, labels = _own(probs, labels), np.asarray(labels)
    if np.shape(probs)[1] < 2:
        raise ValueError("probs have one class only; a margin needs another one")
    others = np.array(probs, dtype=np.result_type(probs, np.float32))
    others[np.arange(len(others)), labels] = -np.inf
    return others.max(axis=1) - own


def entropy(probs: Array) -> Array:
    """`-sum_k p_k log(p_k + 1e-6)`, blind to the label. Source: Table 5.1 "Entropy"."""
    probs = _matrix("probs", probs)
    return -(probs * np.log(probs + EPS)).sum(axis=1)


def least_confidence(probs: Array) -> Array:
    """`-max_k p_k`, blind to the label. Source: Table 5.1 "Least-confidence"."""
    return -_matrix("probs", probs).max(axis=1)


def cwe(probs: Array, labels: Array) -> Array:
    """Confidence-weighted entropy `-p_y / H(p)`. Source: Table 5.1 "CWE" (Kuan and Mueller 2022).

    Differs: a one-hot `p` has no entropy and gives NaN or infinity in the reference code; H is floored at 1e-12 here.
    """
    return -_own(probs, labels) / np.maximum(entropy(probs), 1e-12)


def tracin(features: Array, probs: Array, labels: Array) -> Array:
    """Last-layer self-influence `|f|^2 |onehot(y) - p|^2`. Source: Table 5.1 "TracIn" (Pruthi et al. 2020).

    Args:
        features: (n, d) embeddings as the classifier head receives them, **not** normalised.
        probs: (n, C) class probabilities.
        labels: (n,) integer labels in [0, C).
    """
    _own(probs, labels)
    features = check_array("features", features, 2, rows=len(probs))
    error, labels = np.array(probs, dtype=np.result_type(probs, np.float32)), np.asarray(labels)
    error[np.arange(len(error)), labels] -= 1
    return (features**2).sum(axis=1) * (error**2).sum(axis=1)


def jensen_shannon(probs: Array, labels: Array) -> Array:
    """`(KL(m | p) + KL(m | onehot)) / 2` with `m` the mean of both, 1e-6 added to p and the one-hot label.

    Source: `cal_jsd` of the reference code, which never calls it; not in the dissertation.
    Differs: the usual Jensen-Shannon divergence has the arguments of both KL terms the other way round.
    """
    _own(probs, labels)
    probs, labels = np.asarray(probs), np.asarray(labels)
    given = probs.astype(np.float64) + EPS
    target = np.full_like(given, EPS)
    target[np.arange(len(target)), labels] += 1
    middle = (given + target) / 2
    return (middle * (np.log(middle) - (np.log(given) + np.log(target)) / 2)).sum(axis=1)


def max_softmax(logits: Array) -> Array:
    """Minus the largest softmax probability (MSP). Source: Table 5.6; Hendrycks and Gimpel 2017."""
    logits = _matrix("logits", logits)
    return -np.exp(logits.max(axis=1) - _logsumexp(logits))


def max_logit(logits: Array) -> Array:
    """Minus the largest logit. Source: Table 5.6; Hendrycks et al. 2022."""
    return -_matrix("logits", logits).max(axis=1)


def energy(logits: Array) -> Array:
    """Free energy `-logsumexp(logits)` at temperature 1. Source: Table 5.6; Liu et al. 2020."""
    return -_logsumexp(_matrix("logits", logits))


def react_threshold(train_features: Array, percentile: float = 90.0) -> float:
    """ReAct's clipping value: a percentile of all training activations. Source: Sun et al. 2021."""
    percentile = check_number("percentile", percentile, 0, 100)
    return float(np.percentile(_matrix("train_features", train_features), percentile, method="higher"))


def react(features: Array, weight: Array, bias: Array, threshold: float) -> Array:
    """Energy of the logits after activations are clipped at `threshold`. Source: Table 5.6 "ReAct"; Sun et al. 2021.

    Args:
        features: (n, d) penultimate activations.
        weight: (C, d) of the classifier head; `bias`: (C,).
        threshold: `react_threshold(train_features)`.

    Differs: the reference code overwrites its threshold, so that its ReAct row equals Energy exactly.
    """
    features, weight = _features(features=features, weight=weight)
    bias, threshold = check_array("bias", bias, 1, rows=len(weight)), check_number("threshold", threshold)
    return energy(np.minimum(features, threshold) @ weight.T + bias)


def mahalanobis(
    features: Array, train_features: Array, train_labels: Array, tied: bool = False, ridge: float = 1e-3
) -> Array:
    """Smallest class-wise Mahalanobis distance `min_c (x - mu_c)^T (Cov_c + ridge I)^-1 (x - mu_c)`.

    Args:
        features: (n, d) rows to score.
        train_features: (m, d); `train_labels`: (m,), at least two rows a class.
        tied: One covariance for all classes (Lee et al. 2018) instead of one a class (the reference code).
        ridge: Added to the diagonal, in squared feature units. Default 1e-3.

    Source: Table 5.6; Lee et al. 2018. Cost: one d x d factorisation a class, or one if tied.
    """
    features, train_features = _features(features=features, train_features=train_features)
    train_labels = check_array("train_labels", train_labels, 1, kinds="iu", rows=len(train_features))
    tied, ridge = check_flag("tied", tied), check_number("ridge", ridge, 0, above=True)
    classes = np.unique(train_labels)
    groups = [train_features[train_labels == c].astype(np.float64) for c in classes]
    if min(len(group) for group in groups) < 2:
        raise ValueError("a class has fewer than two training rows: no covariance; drop it or set more data aside")
    centred = [group - group.mean(axis=0) for group in groups]
    eye = ridge * np.eye(train_features.shape[1])
    if tied:
        shared = sum(c.T @ c for c in centred) / len(train_features) + eye
        covariances = [shared] * len(groups)
    else:
        covariances = [c.T @ c / len(c) + eye for c in centred]
    best = np.full(len(features), np.inf)
    for group, covariance in zip(groups, covariances, strict=True):
        offset = features - group.mean(axis=0)
        try:
            solved = np.linalg.solve(covariance, offset.T).T
        except np.linalg.LinAlgError as error:
            raise ValueError(f"a covariance is singular with ridge={ridge:g}; use a larger ridge") from error
        best = np.minimum(best, np.einsum("nd,nd->n", offset, solved))
    return best


def kl_matching(probs: Array, train_probs: Array) -> Array:
    """`min_c KL(p || mean training p of rows predicted as c)`, eps 1e-6. Source: Table 5.6; Hendrycks et al. 2022.

    Differs: classes that no training row is predicted as are left out (NaN in the reference code).
    """
    probs, train_probs = _features(probs=probs, train_probs=train_probs)
    predicted = train_probs.argmax(axis=1)
    means = np.stack([train_probs[predicted == c].mean(axis=0) for c in np.unique(predicted)])
    own = (probs * np.log(probs + EPS)).sum(axis=1, keepdims=True)
    return (own - probs @ np.log(means + EPS).T).min(axis=1)


def knn(features: Array, train_features: Array, k: int = 1000) -> Array:
    """`1 / (cosine to the (k+1)-th nearest training row, floored at 0, + 1e-6)`. Source: Table 5.6 "KNN"; Sun et al. 2022.

    Args:
        features: (n, d) rows to score; `train_features`: (m, d) reference rows, m > k.
        k: Which neighbour. Default 1000, the reference code's at full size. It takes the (k+1)-th, kept here.

    Cost: one (1000, m) block of similarities at a time.
    """
    features, train_features = _features(features=features, train_features=train_features)
    k = check_int("k", k, 0, len(train_features) - 1, todo="choose k below the number of training rows")
    reference, scores = _unit(train_features), []
    for start in range(0, len(features), 1000):
        similarity = _unit(features[start : start + 1000]) @ reference.T
        kth = np.partition(similarity, len(reference) - 1 - k, axis=1)[:, len(reference) - 1 - k]
        scores.append(1 / (np.maximum(kth, 0) + EPS))
    return np.concatenate(scores)


def local_outlier_factor(features: Array, train_features: Array | None = None, neighbors: int = 20) -> Array:
    """Scikit-learn's local outlier factor, within `features` or against `train_features`. Source: Table 5.3 "LOF".

    Raises:
        MissingExtraError: scikit-learn is not installed (`pip install "hf-dataopt[demo]"`).
    """
    try:
        from sklearn.neighbors import LocalOutlierFactor
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "demo", "local_outlier_factor") from error
    neighbors = check_int("neighbors", neighbors, 1)
    (features,) = _features(features=features)
    if train_features is not None:
        features, train_features = _features(features=features, train_features=train_features)
    if train_features is None:
        return -LocalOutlierFactor(n_neighbors=neighbors).fit(features).negative_outlier_factor_
    return -LocalOutlierFactor(n_neighbors=neighbors, novelty=True).fit(train_features).score_samples(features)


def _matrix(name: str, values: Array) -> Array:
    """(n, columns) finite numbers, as an array; rows of probabilities sum to 1."""
    found = check_array(name, values, 2)
    if "probs" in name and ((found < 0).any() or (np.abs(found.sum(axis=1) - 1) > 0.02).any()):
        raise ValueError(f"{name} must be >= 0 and sum to 1 in every row; pass softmax outputs, not logits")
    return found


def _features(**matrices: Array) -> list[Array]:
    """Matrices of one width."""
    found = [_matrix(name, values) for name, values in matrices.items()]
    if len({one.shape[1] for one in found}) > 1:
        shapes = ", ".join(f"{name} {one.shape}" for name, one in zip(matrices, found, strict=True))
        raise ValueError(f"{shapes} have rows of different length; they must come from one model")
    return found


def _own(probs: Array, labels: Array) -> Array:
    probs = _matrix("probs", probs)
    labels = numbers("labels", labels, kinds="iu")
    if labels.shape != (len(probs),):
        raise ValueError(f"labels have shape {labels.shape}, probs {len(probs)} rows; give one integer a row")
    if labels.size and (labels.min() < 0 or labels.max() >= probs.shape[1]):
        raise ValueError(f"labels span {labels.min()} .. {labels.max()} with {probs.shape[1]} probability columns")
    return probs[np.arange(len(probs)), labels]


def _logsumexp(logits: Array) -> Array:
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1))


def _unit(features: Array) -> Array:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
