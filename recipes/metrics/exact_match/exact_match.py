"""Share of predictions that equal their reference, spaces at the ends aside."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """Compare strings; opened by `evaluate.load("recipes/metrics/exact_match")`, without a network."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: lists of strings of equal length",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        hits = sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True))
        return {"exact_match": hits / len(references)}
