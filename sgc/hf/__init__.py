"""SGC in Hugging Face's Trainer: groups of parameters from a model's names, and a callback that reports."""

try:
    import transformers  # noqa: F401  # what follows is made of it
except ImportError as error:
    raise ImportError('sgc.hf needs transformers: pip install "sgc[hf]"') from error

from sgc.hf.callback import SGCCallback
from sgc.hf.checks import find_sgc, left_out
from sgc.hf.factory import SGCFactory, create_sgc_optimizer
from sgc.hf.groups import check_overrides, parameter_groups
from sgc.hf.measures import tensor_bytes

__all__ = [
    "SGCCallback",
    "SGCFactory",
    "check_overrides",
    "create_sgc_optimizer",
    "find_sgc",
    "left_out",
    "parameter_groups",
    "tensor_bytes",
]
