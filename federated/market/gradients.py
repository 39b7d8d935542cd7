"""Rows as sketches of per-example gradients of the model that is to be fine-tuned. (ours)"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from federated.market.encoders import unit_rows
from federated.market.fingerprint import Encoder, digest_of, tokenizer_settings
from sgc.checks import whole
from sgc.codec import Codec


class GradientFeatures:
    """Sketches of per-example gradients of the model that is to be fine-tuned, through `sgc.codec`. (ours)

    One vmapped backward for all rows of a length; each row's gradient, flattened over the chosen parameters, is
    sparsified and projected to `sketch_size` numbers. A is data-independent, so both sides make the same, and inner
    products of sketches are those of the sparse gradients up to 1/√k.

    Args:
        model: transformers', with a loss when given labels; its attention should be "eager".
        tokenizer: of the model; rows are dicts with a text column and "label" (or, for a causal model, texts).
        parameters: a regular expression; the gradients of the parameters it finds are taken.
        sketch_size: k, the dimension D of the vectors.
        sparsity: s, the largest entries of a gradient that are kept.
        seed: of A.
        normalize: scale rows to unit norm.
        max_length: of a text, in tokens.
        batch_size: rows in one pass.
        name: of the model, for people.

    Raises:
        ValueError: no parameter matches.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        parameters: str = ".",
        sketch_size: int = 512,
        sparsity: int = 1024,
        seed: int = 0,
        normalize: bool = True,
        max_length: int = 128,
        batch_size: int = 16,
        name: str = "gradients",
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        max_length = self.max_length = whole("max_length", max_length, at_least=1)
        self.batch_size: int = whole("batch_size", batch_size, at_least=1)
        sparsity = whole("sparsity", sparsity, at_least=1)
        held = {n: p.detach() for n, p in model.named_parameters()}
        self._free = {n: p for n, p in held.items() if re.search(parameters, n)}
        self._fixed = {n: p for n, p in held.items() if n not in self._free}
        if not self._free:
            raise ValueError(f"parameters must match a name such as {next(iter(held), None)!r}, got {parameters!r}")
        self.entries = sum(p.numel() for p in self._free.values())
        self.codec = Codec(None, sketch_size, min(sparsity, self.entries), seed)
        settings = {
            "kind": "gradients",
            "parameters": sorted(self._free),
            "codec": repr(self.codec),
            "max_length": max_length,
            "model": type(model).__name__,
            **tokenizer_settings(tokenizer),
        }
        digest = digest_of(settings, dict(model.state_dict()))
        self.encoder = Encoder(name, digest, "sketched gradients", normalize, min(sketch_size, self.entries))
        self.whole_rows = True

    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Sketch the gradient of every row's loss."""
        ids, labels = zip(*map(self._example, rows), strict=True)
        x = torch.empty(len(rows), self.encoder.dimension)
        by_length: dict[int, list[int]] = {}
        for i, tokens in enumerate(ids):
            by_length.setdefault(len(tokens), []).append(i)
        for same in by_length.values():  # without padding there is no mask, on which models branch as vmap can't
            for start in range(0, len(same), self.batch_size):
                part = same[start : start + self.batch_size]
                gradient = self.gradients(torch.tensor([ids[i] for i in part]), torch.tensor([labels[i] for i in part]))
                for i, g in zip(part, gradient, strict=True):
                    x[i] = self.codec.encode(g).reshape(-1)
        return unit_rows(x) if self.encoder.normalize else x

    def _example(self, row: Any) -> tuple[list[int], Any]:
        fields = {"text": row} if isinstance(row, str) else dict(row)
        label = fields.pop("label", fields.pop("labels", None))
        texts = [value for value in fields.values() if isinstance(value, str)]
        if len(texts) != len(fields) or not 1 <= len(texts) <= 2:
            raise ValueError("a row must be one text or two, with a label or, for a causal model, without")
        ids = self.tokenizer(*texts, truncation=True, max_length=self.max_length)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"a row must have at least 2 tokens, got {texts[0]!r}")
        return ids, ids if label is None else label

    def gradients(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Compute every row's own gradient in one vmapped pass.

        Args:
            ids: (m, length) tokens.
            labels: (m,) or (m, length).

        Returns:
            (m, entries) fp32.
        """
        from torch.func import functional_call, grad, vmap

        def loss(free: dict[str, Tensor], ids: Tensor, label: Tensor) -> Tensor:
            inputs = {"input_ids": ids[None], "labels": label[None]}
            return functional_call(self.model, {**self._fixed, **free}, kwargs=inputs).loss

        device = next(iter(self._free.values())).device
        found = vmap(grad(loss), in_dims=(None, 0, 0))(self._free, ids.to(device), labels.to(device))
        return torch.cat([found[n].flatten(1) for n in self._free], 1).float()
