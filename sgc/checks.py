"""What an argument must be: a number, a flag, a word. A refusal is a sentence with the name, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

from torch import Tensor

WIDEST = 100  # characters of a value that a sentence shows


def shown(value: Any) -> str:
    """Return a value as a sentence shows it: on one line, and no longer than `WIDEST` characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RuntimeError):  # integers of 4,301 digits and some tensors have no text
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def plain(value: Any) -> Any:
    """Return the Python number inside one of NumPy's, or inside an array or a tensor of one entry; else the value."""
    entries = value.numel() if isinstance(value, Tensor) else 1 if getattr(value, "shape", None) == () else 0
    try:
        return value.item() if entries == 1 else value
    except RuntimeError:  # meta and fake tensors have no number
        return value


def whole(name: str, value: Any, *, at_least: int | None = None, optional: bool = False) -> Any:
    """Return a whole number as an int.

    Args:
        name: of the argument.
        value: an integer of any kind; a bool is none.
        at_least: its lowest value.
        optional: whether None is allowed.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is below `at_least`, or needs more than 64 bits.
    """
    if value is None and optional:
        return None
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, Integral):
        raise TypeError(f"{name} must be a whole number{' or None' * optional}, got {shown(value)}")
    number = int(found)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {shown(value)}")
    if at_least is not None and number < at_least:
        rule = "must not be negative" if at_least == 0 else f"must be at least {at_least}"
        raise ValueError(f"{name} {rule}, got {shown(value)}")
    return number


def real(name: str, value: Any, *, optional: bool = False) -> Any:
    """Return a finite number as a float.

    Args:
        name: of the argument.
        value: a real number of any kind, or a tensor of one entry; a bool is none.
        optional: whether None is allowed.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is not finite.
    """
    if value is None and optional:
        return None
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, Real):
        raise TypeError(f"{name} must be a number{' or None' * optional}, got {shown(value)}")
    try:
        number = float(found)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return number


def rate(name: str, value: Any) -> float:
    """Return a finite number that is not negative as a float, as `real` does.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is negative or not finite.
    """
    number: float = real(name, value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {shown(value)}")
    return number


def flag(name: str, value: Any, *, optional: bool = False) -> Any:
    """Return True or False; no other value stands for them.

    Raises:
        TypeError: it is neither.
    """
    found = plain(value)
    if not isinstance(found, bool) and not (optional and found is None):
        raise TypeError(f"{name} must be True or False{' or None' * optional}, got {shown(value)}")
    return found


def word(name: str, value: Any, words: Iterable[str], rule: str = "one of") -> str:
    """Return one of several words as a plain str.

    Args:
        name: of the argument.
        value: the word.
        words: all that it may be.
        rule: what the sentence says before them.

    Raises:
        TypeError: it is not a str.
        ValueError: it is another word.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {rule} {', '.join(words)}, got {shown(value)}")
    if value not in words:
        raise ValueError(f"{name} must be {rule} {', '.join(words)}, got {shown(value)}")
    return str.__str__(value)


def sequence(name: str, value: Any, rule: str) -> tuple[Any, ...]:
    """Return the elements of a sequence of any class: whatever has an order, a text excepted.

    Args:
        name: of the argument.
        value: the sequence.
        rule: what it must be, for the sentence.

    Raises:
        TypeError: it is none.
    """
    ordered = isinstance(value, Sequence) or getattr(value, "shape", ()) != ()  # an array or a tensor
    if not ordered or isinstance(value, str | bytes | Mapping | Set):
        raise TypeError(f"{name} must be {rule}, got {shown(value)}")
    return tuple(value)
