"""What `SGC.stats` says of the recovery, from a look at the first chunks of each tensor at some steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sgc.step import PROBED_CHUNKS, Recovered
from sgc.views import View

PROBE_EVERY = 10  # steps from one look at the recovery to the next
_NOTHING = torch.full((1, 3), math.nan, dtype=torch.float32, device="cpu")


class Probes:
    """The last looks at the recovery: at the first and every tenth step, and the supports of the step before."""

    def __init__(self) -> None:
        self._step = 0
        self._looks: list[Tensor] = []
        self._supports: dict[Any, Tensor] = {}

    def begin(self, step: int) -> None:
        """Begin a step, counted from 1; a step may begin again."""
        if step != self._step:
            self._step = step
            self._looks = [] if self._looking else self._looks

    @property
    def _looking(self) -> bool:
        return self._step == 1 or self._step % PROBE_EVERY == 0

    @property
    def due(self) -> bool:
        """Whether `look` does anything at this step."""
        return self._looking or self._step % PROBE_EVERY == PROBE_EVERY - 1

    def look(self, view: View, found: Recovered | None) -> None:
        """Look at what was recovered of a tensor, if it is time."""
        if found is None or not self.due:
            return
        index, value = found.index[:PROBED_CHUNKS], found.value[:PROBED_CHUNKS]
        if not self._looking:
            self._supports[view.key] = index.clone()
            return
        last = self._supports.pop(view.key, None)
        left, whole = torch.zeros(2, dtype=torch.float32, device=index.device)
        if found.target is not None and view.projection is not None and view.rule.square is None:
            explained = view.projection.project(index, value, view.chunks.chunk)
            left, whole = (found.target - explained).square().sum(), found.target.square().sum()
        unknown = torch.full((), math.nan, dtype=torch.float32, device=index.device)
        overlap = unknown if last is None else _overlap(index, last)
        self._looks.append(torch.stack([left, whole, overlap]))

    def tensors(self) -> list[Tensor]:
        """List what is held."""
        return [*self._supports.values(), *self._looks]

    def stats(self) -> dict[str, float]:
        """Return recovery_error, recovered_fraction and support_overlap, as `SGC.stats` describes them."""
        looks = torch.stack([look.cpu() for look in self._looks]) if self._looks else _NOTHING
        left, whole = looks[:, 0].sum().item(), looks[:, 1].sum().item()
        unexplained = left / whole if whole > 0 else math.nan
        return {
            "recovery_error": math.sqrt(unexplained),
            "recovered_fraction": 1 - unexplained,
            "support_overlap": looks[:, 2].nanmean().item(),
        }


def _overlap(index: Tensor, last: Tensor) -> Tensor:
    """Compute the share of the positions (c, s'), ascending in each chunk, that are among the last ones (c, s')."""
    last = last.contiguous()
    at = torch.searchsorted(last, index.contiguous()).clamp_(max=last.shape[1] - 1)
    return (last.gather(1, at) == index).float().mean()
