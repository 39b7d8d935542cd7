"""Sparse gradient compression: fine-tune all parameters with an optimizer state of any size.

gradient ─ sparsify ─ project ─▶ [ moments of the sketch ] ─▶ recover ─ update
"""

from typing import Any

from sgc.codec import Codec
from sgc.optimizer import SGC

__all__ = ["SGC", "Codec", "plan"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the planner, which needs transformers, when it is asked for."""
    if name == "plan":
        from sgc.planner import plan

        return plan
    raise AttributeError(f"module 'sgc' has no attribute {name!r}")
