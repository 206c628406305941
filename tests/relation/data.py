"""Small seeded inputs for the relation tests: clustered features, probabilities, labels with known errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value


@dataclass
class Case:
    """Inputs of one graph."""

    features: np.ndarray
    probs: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray

    def dataset(self, **more: np.ndarray) -> Dataset:
        columns = {"label": self.labels, "features": self.features, "probs": self.probs, **more}
        classes = [f"class {k}" for k in range(self.probs.shape[1])]
        kinds = {
            name: ClassLabel(names=classes)
            if name == "label"
            else List(Value("float32"), length=values.shape[1])
            if values.ndim == 2
            else Value(str(values.dtype))
            for name, values in columns.items()
        }
        return Dataset.from_dict({name: list(values) for name, values in columns.items()}, features=Features(kinds))


def make(n: int = 300, d: int = 12, classes: int = 5, rate: float = 0.1, spread: float = 0.6, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    truth = rng.integers(0, classes, n)
    features = (centres[truth] + spread * rng.normal(size=(n, d))).astype(np.float32)
    logits = 3 * features @ centres.T / np.linalg.norm(centres, axis=1)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    wrong = rng.random(n) < rate
    labels = np.where(wrong, (truth + rng.integers(1, classes, n)) % classes, truth)
    return Case(features, (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32), labels, wrong)
