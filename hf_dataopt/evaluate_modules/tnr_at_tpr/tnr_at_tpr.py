"""`evaluate` module of `hf_dataopt.metrics.tnr_at_tpr`: true-negative rate at a wanted true-positive rate."""

import datasets
import evaluate

from hf_dataopt.metrics import tnr_at_tpr


class TNRAtTPR(evaluate.Metric):
    """True-negative rate at a wanted true-positive rate; `compute(references=0/1, predictions=..., tpr=0.95)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="True-negative rate at a wanted true-positive rate of a detection score (dissertation, chapter 5).",
            citation="",
            inputs_description="references: 1 for what is to be found, else 0; predictions: higher is more suspicious.",
            features=datasets.Features(
                {"references": datasets.Value("int32"), "predictions": datasets.Value("float64")}
            ),
        )

    def _compute(self, references: list[int], predictions: list[float], tpr: float = 0.95) -> dict[str, float]:
        return {"tnr_at_tpr": tnr_at_tpr(references, predictions, tpr)}
