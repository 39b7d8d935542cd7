"""Share of predicted classes (or tokens) that equal their reference."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Compare integers; opened by `evaluate.load("recipes/metrics/accuracy")`, without a network."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: lists of integers of equal length",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        hits = sum(p == r for p, r in zip(predictions, references, strict=True))
        return {"accuracy": float(hits / len(references))}
