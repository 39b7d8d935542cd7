"""The rates of a Trainer for the factory that it calls, to which transformers hands the model alone."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_utils import unwrap_model

from sgc.optimizer import SGC

_by_model: WeakKeyDictionary[nn.Module, TrainingArguments] = WeakKeyDictionary()
_by_callback: WeakKeyDictionary[TrainerCallback, TrainingArguments] = WeakKeyDictionary()  # may make models anew
taken: WeakKeyDictionary[SGC, TrainingArguments] = WeakKeyDictionary()  # with whose rates an optimizer was made


def note(callback: TrainerCallback, model: nn.Module, args: TrainingArguments) -> None:
    """Note the arguments of a Trainer that has just been made; another one's for the same model are forgotten."""
    _by_model[unwrap_model(model)] = args
    _by_callback[callback] = args


def begin(callback: TrainerCallback, model: nn.Module) -> None:
    """Note that a Trainer trains; where it does so with the model it was made with, it makes no other."""
    if unwrap_model(model) in _by_model:
        _by_callback.pop(callback, None)


def find(model: nn.Module) -> TrainingArguments | None:
    """Return the arguments noted for a model; for an unknown one those of the only Trainer that may have made it."""
    known = _by_model.get(unwrap_model(model))
    if known is None and len(_by_callback) == 1:
        return next(iter(_by_callback.values()))
    return known
