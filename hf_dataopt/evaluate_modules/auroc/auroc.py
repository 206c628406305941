"""`evaluate` module of `hf_dataopt.metrics.auroc`: area under the roc curve."""

import datasets
import evaluate

from hf_dataopt.metrics import auroc


class AUROC(evaluate.Metric):
    """Area under the ROC curve; `compute(references=0/1, predictions=higher is more suspicious)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Area under the ROC curve of a detection score (dissertation, chapter 5).",
            citation="",
            inputs_description="references: 1 for what is to be found, else 0; predictions: higher is more suspicious.",
            features=datasets.Features(
                {"references": datasets.Value("int32"), "predictions": datasets.Value("float64")}
            ),
        )

    def _compute(self, references: list[int], predictions: list[float]) -> dict[str, float]:
        return {"auroc": auroc(references, predictions)}
