"""The public place of `reshape_checkpoint`, for `from sgc.zero_checkpoint import reshape_checkpoint`."""

from sgc.parallel.zero_checkpoint import reshape_checkpoint

__all__ = ["reshape_checkpoint"]
