"""What the numbers of federations and markets must be: sentences with the name, the rule and the value."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sgc.checks import real, shown, whole


def positive(name: str, value: Any) -> float:
    """Return a positive finite number as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite.
    """
    try:
        found: float = real(name, value)
    except ValueError:  # it is not finite
        found = 0.0
    if not found > 0:
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}")
    return found


def share(name: str, value: Any, *, least: bool = True, most: bool = False) -> float:
    """Return a number between 0 and 1 as a float.

    Args:
        name: of the argument.
        value: the number.
        least: whether it may be 0.
        most: whether it may be 1.

    Raises:
        TypeError: it is no number.
        ValueError: it is not in the interval.
    """
    found: float = real(name, value)
    if not 0 <= found <= 1 or (found == 0 and not least) or (found == 1 and not most):
        raise ValueError(f"{name} must be in {'(['[least]}0, 1{')]'[most]}, got {shown(value)}")
    return found


def instance(name: str, value: Any, kind: type) -> Any:
    """Return an instance of a class.

    Raises:
        TypeError: it is of another.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {shown(value)}")
    return value


def chosen(name: str, value: Any, most: int, *, whole_of: str) -> int | None:
    """Return how many of several things are chosen, or None for all of them.

    Args:
        name: of the argument.
        value: the number.
        most: how many there are.
        whole_of: what the sentence calls `most`.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is not in [1, most].
    """
    found: int | None = whole(name, value, optional=True)
    if found is not None and not 1 <= found <= most:
        raise ValueError(f"{name} must be in [1, {whole_of}={most}], got {shown(value)}")
    return found


def check_options(args: argparse.Namespace, parser: argparse.ArgumentParser, lowest: Mapping[str, float]) -> None:
    """Check every number of a command line, used or not: finite, whole ones at least 1, and others not negative.

    Args:
        args: what was parsed.
        parser: that did it.
        lowest: by the name of an option, another lowest value; −inf admits whatever its user judges.

    Raises:
        ValueError: a number that is none of that; the sentence names the option.
    """
    for action in parser._actions:
        value, name = getattr(args, action.dest, None), (action.option_strings or [action.dest])[-1]
        if value is None or action.type not in (int, float):
            continue
        least = lowest.get(action.dest, 1 if action.type is int else 0)
        if least > float("-inf"):
            real(name, value)
            if value < least:
                raise ValueError(f"{name} must be at least {least:g}, got {value}")
