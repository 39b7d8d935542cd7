"""Sketches of updates, which an uncoded uplink adds up. [ADSGD] arXiv 1901.00844, [CADSGD] arXiv 1907.09769."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from federated.arguments import chosen, instance, share
from federated.channel import Channel
from federated.draws import Draws
from federated.server import check_state
from federated.uplink.base import Encoded, Uplink, UplinkRound
from federated.uplink.digital import QuantizedUplink
from sgc.checks import word
from sgc.codec import Codec
from sgc.codec.layout import make_layout
from sgc.codec.recover import METHODS


class _SketchedRound(UplinkRound):
    """A round of the uplink below, in which the sketches are the updates."""

    uplink: SketchedUplink

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shape = self.uplink.sketch_shape(self.size)
        self.below = self.uplink.over.open(math.prod(self.shape), self.served, None, self.draws)

    def hear(self, devices: Tensor, encoded: Encoded, weight: Tensor) -> Tensor:
        return self.below.hear(devices, encoded, weight)

    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        self.below.add(devices, payload, weight)

    def estimate(self) -> Tensor | None:
        sketch = self.below.receive()
        self.traffic = self.below.traffic
        return None if sketch is None else self.uplink.decode(sketch.view(self.shape), self.size)


class SketchedUplink(Uplink):
    """Devices send sketches of their updates; the link adds them; the server decodes the sum once. [ours in this form]

    Device m sends A·top_s(Δ_m + e_m), chunk by chunk, and e_m keeps what sparsification dropped. Supports differ
    between devices, so the server recovers s' > s entries of each chunk. A depends on the seed alone: a projection made
    from the data (double compression's basis) differs between devices, and has no place here.

    Args:
        over: the uncoded link that the sketches cross.
        chunk_size: n; None: all of an update.
        sketch_size: k, numbers sent per chunk.
        sparsity: s, entries each device keeps of a chunk.
        recovered: s', at most k; default 2·s within k.
        residual: ρ; the server keeps in the sketch what was received and not yet recovered, E ← ρE + y − A·u. 0: it
            keeps nothing.
        method: of recovery.
        seed: of A.

    Raises:
        TypeError: `over` codes what it sends.
        ValueError: a size or ρ out of range.
    """

    round_type = _SketchedRound

    def __init__(
        self,
        over: Uplink,
        *,
        chunk_size: int | None = 1024,
        sketch_size: int = 256,
        sparsity: int = 32,
        recovered: int | None = None,
        residual: float = 0.0,
        method: str = "omp",
        seed: int = 0,
    ) -> None:
        if isinstance(instance("over", over, Uplink), QuantizedUplink | SketchedUplink):
            raise TypeError(f"sketches cross an uncoded link, got {type(over).__name__}")
        self.codec = Codec(chunk_size, sketch_size, sparsity, seed)
        most = self.codec.sketch_size
        self.recovered = chosen("recovered", recovered, most, whole_of="sketch_size") or min(2 * sparsity, most)
        self.over, self.rho = over, share("residual", residual, most=True)
        self.method = word("method", method, METHODS)
        self.residual: Tensor | None = None

    def memory_rows(self, num_devices: int) -> int:
        """Return M: e_m of every device."""
        return num_devices

    def state(self) -> dict[str, Tensor]:
        """Return the residual E (c, k)."""
        return {} if self.residual is None else {"residual": self.residual}

    def load_state(self, state: dict[str, Tensor], size: int) -> None:
        """Restore E; raises ValueError for one of another size or type."""
        if state:  # before the first update was heard there is no residual
            check_state(state, {"residual": self.sketch_shape(size)} if self.rho else {})
        self.residual = state.get("residual")

    def sketch_shape(self, size: int) -> tuple[int, int]:
        """Return (c, min(k, n)) for d numbers."""
        layout = make_layout((size,), self.codec.chunk_size)
        return layout.chunks, min(self.codec.sketch_size, layout.chunk)

    def encode(
        self, devices: Tensor, update: Tensor, held: Tensor | None, budget: list[float], draws: Draws
    ) -> Encoded:
        """Sketch Δ_m + e_m; see `Uplink.encode`."""
        sketch, rest = self.codec.encode_rows(update if held is None else update + held)
        return Encoded(sketch.flatten(1), rest, torch.ones(len(devices), dtype=torch.bool))

    def decode(self, sketch: Tensor, size: int) -> Tensor:
        """Recover the update (d,) from the mean of the sketches (c, k), and move the residual."""
        if self.rho and self.residual is not None:
            sketch = sketch + self.rho * self.residual
        update = self.codec.decode(sketch, (size,), sparsity=self.recovered, method=self.method)
        if self.rho:
            self.residual = sketch - self.codec.encode_rows(update[None], sparsity=self.recovered)[0][0]
        return update


def sketch_size_that_fits(size: int, chunk_size: int, channel: Channel) -> int:
    """Return the largest k whose sketches of d numbers fit the channel's budget of T·F complex symbols a round.

    Raises:
        ValueError: no budget, or one that does not hold one number per chunk.
    """
    if channel.ofdm_symbols is None:
        raise ValueError("sketches are fitted to a budget: set the channel's ofdm_symbols")
    layout = make_layout((size,), chunk_size)
    numbers = 2 * channel.ofdm_symbols * channel.subchannels
    if numbers < layout.chunks:
        raise ValueError(f"a budget of {numbers} numbers does not hold one for each of {layout.chunks} chunks")
    return min(numbers // layout.chunks, layout.chunk)
