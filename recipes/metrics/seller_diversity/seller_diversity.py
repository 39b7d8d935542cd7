"""Diversity of a seller's rows for a buyer, by the moments of both along the buyer's principal directions."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from federated.market import score
from federated.market.query import Encoder, answer, make_query


class SellerDiversity(evaluate.Measurement):
    """Compare two sets of vectors; `evaluate.load("recipes/metrics/seller_diversity", module_type="measurement")`."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=__doc__,
            citation="",
            inputs_description="data: the seller's vectors, (n, D); buyer: the buyer's, (m, D), as a keyword; "
            "directions: how many principal directions of the buyer to compare along, 10 by default",
            features=datasets.Features({"data": datasets.Sequence(datasets.Value("float32"))}),
        )

    def compute(self, *, data: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """Measure arrays as they are: written to a table first, as evaluate does, they take ten times as long."""
        return super().compute(**kwargs) if data is None else self._compute(data, **kwargs)

    def _compute(self, data: Any, buyer: Any = None, directions: int = 10) -> dict[str, float]:
        if buyer is None:
            raise ValueError("the buyer's vectors must be given, as compute(data=seller, buyer=buyer)")
        seller, buyer = (torch.as_tensor(np.asarray(x, dtype=np.float32)) for x in (data, buyer))
        encoder = Encoder("vectors", "0" * 64, "none", False, buyer.shape[-1])
        query, key = make_query(buyer, encoder, directions=directions, decoys=0, seed=0)
        moments = key.seller(answer(query, [seller], encoder, "seller"))
        found = score.score(key.buyer(), moments, "diversity")
        return {"seller_diversity": found.value, "standard_error": found.standard_error}
