"""Sparse gradient compression: fine-tune all parameters with an optimizer state of any size.

gradient ─ sparsify ─ project ─▶ [ moments of the sketch ] ─▶ recover ─ update
"""

from sgc.codec import Codec
from sgc.optimizer import SGC

__all__ = ["SGC", "Codec"]
__version__ = "0.1.0"
