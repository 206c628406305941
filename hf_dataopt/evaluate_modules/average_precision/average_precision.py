"""`evaluate` module of `hf_dataopt.metrics.average_precision`: average precision."""

import datasets
import evaluate

from hf_dataopt.metrics import average_precision


class AveragePrecision(evaluate.Metric):
    """Average precision; `compute(references=0/1, predictions=higher is more suspicious)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Average precision of a detection score (dissertation, chapter 5).",
            citation="",
            inputs_description="references: 1 for what is to be found, else 0; predictions: higher is more suspicious.",
            features=datasets.Features(
                {"references": datasets.Value("int32"), "predictions": datasets.Value("float64")}
            ),
        )

    def _compute(self, references: list[int], predictions: list[float]) -> dict[str, float]:
        return {"average_precision": average_precision(references, predictions)}
