"""Tensors and numbers ⇄ Flower's records; of a stranger's nothing is believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from torch import Tensor

from federated.draws import Draws

MOST_TEXT = 300  # characters of a stranger's sentence that are passed on


def arrays(**tensors: Tensor) -> ArrayRecord:
    """Make a record of tensors by name."""
    return ArrayRecord({name: Array(tensor.detach().contiguous().numpy()) for name, tensor in tensors.items()})


def tensor_of(record: Any, name: str) -> Tensor:
    """Read a tensor of a record, as a copy."""
    return torch.from_numpy(np.array(record[name].numpy()))


def fields_of(message: Message, name: str) -> Any:
    """Return a record of metrics or settings, by whose names numbers are read."""
    return message.content[name]


def draws_of(config: Any) -> Draws:
    """Return the random numbers of the round that a message's settings name."""
    return Draws((int(config["seed"]),)).at("round", int(config["round"]))


def record_of(content: RecordDict, name: str, kind: type) -> Any:
    """Return a record of a stranger's message.

    Raises:
        ValueError: there is none, or one of another kind.
    """
    record = content.get(name)
    if not isinstance(record, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {type(record).__name__}")
    return record


def count_of(metrics: Any, name: str, least: int, most: int) -> int:
    """Return a whole number that a stranger sent.

    Raises:
        ValueError: it is none, or not in [least, most].
    """
    value = metrics.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number in [{least}, {most}], got {printable(value)}")
    return value


def printable(value: Any) -> str:
    """Return what a stranger sent as text: on one line, short, and nothing that a terminal obeys."""
    text = " ".join(str(value).split())[:MOST_TEXT]
    return "".join(c if c.isprintable() else "?" for c in text)


def reason_of(reply: Message) -> str:
    """Return what an error on a node was."""
    return printable(reply.error.reason or f"error {reply.error.code}")
