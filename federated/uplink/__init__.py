"""Devices → server: the estimate of the weighted mean of the updates, Σ_m (B_m/B)·Δ_m, and what it cost.

| uplink | what travels | who remembers |
|---|---|---|
| `IdealUplink` | Δ_m, exactly | nobody |
| `QuantizedUplink` | Q(Δ_m + e_m) [LFL] | e_m, what quantization left out |
| `AnalogUplink` | Δ_m/h_m, silent where abs(h) < λ: truncated channel inversion [NOISY] | nobody |
| `BlindUplink` | Δ_m, no CSI at the devices; the server's N_r antennas combine [BLIND] | nobody |
| `SketchedUplink` | A·top_s(Δ_m + e_m), over an uncoded link [ADSGD, CADSGD; this form: ours] | e_m; a residual |

[LFL] arXiv 2006.10672, [NOISY] arXiv 2008.11141, [BLIND] arXiv 2010.10030, [ADSGD] arXiv 1901.00844, [CADSGD] arXiv
1907.09769. `federated.schemes` names them; docs/federated.md shows how to add one.
"""

from federated.uplink.analog import AnalogUplink, OverTheAirRound
from federated.uplink.base import Encoded, Uplink, UplinkRound
from federated.uplink.blind import BlindUplink, blind_error
from federated.uplink.digital import IdealUplink, QuantizedUplink
from federated.uplink.sketched import SketchedUplink, sketch_size_that_fits

__all__ = [
    "AnalogUplink",
    "BlindUplink",
    "Encoded",
    "IdealUplink",
    "OverTheAirRound",
    "QuantizedUplink",
    "SketchedUplink",
    "Uplink",
    "UplinkRound",
    "blind_error",
    "sketch_size_that_fits",
]
