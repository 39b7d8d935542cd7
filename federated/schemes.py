"""The wireless systems by name: what command lines and Flower apps choose from. `register` adds one.

A name stands for a maker of a link: its class, or a function. A maker's arguments are filled in by their names, with
what a run knows (`channel`, `size` for d, …) and what its user sets.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from federated.channel import MultipleAccess
from federated.downlink import AnalogDownlink, DigitalDownlink, Downlink, IdealDownlink, SelectionDownlink
from federated.uplink import (
    AnalogUplink,
    BlindUplink,
    IdealUplink,
    QuantizedUplink,
    SketchedUplink,
    Uplink,
    sketch_size_that_fits,
)
from sgc.checks import word

Maker = Callable[..., Any] | str  # or where it is, "module:name", to be imported when it is used


def _quantized(levels: int = 3) -> Uplink:
    return QuantizedUplink(levels)


def _blind(channel: MultipleAccess, antennas: int = 40) -> Uplink:
    return BlindUplink(replace(channel, antennas=antennas))


def _sketched(
    channel: MultipleAccess,
    size: int,
    sketch: Mapping[str, Any],
    over: str = "analog",
    threshold: float = 0.2,
    antennas: int = 40,
) -> Uplink:
    """Make an uplink of sketches over another one; they are made to fit the channel's budget, if it has one."""
    fitted = dict(sketch)
    if channel.ofdm_symbols is not None:
        fits = sketch_size_that_fits(size, fitted["chunk_size"], channel)
        fitted["sketch_size"] = min(fitted["sketch_size"], fits)
    below = make_uplink(over, channel=channel, size=size, threshold=threshold, antennas=antennas)
    return SketchedUplink(below, **fitted)


DOWNLINKS: dict[str, Maker] = {
    "ideal": IdealDownlink,
    "selection": SelectionDownlink,
    "digital": DigitalDownlink,
    "analog": AnalogDownlink,
}
UPLINKS: dict[str, Maker] = {
    "ideal": IdealUplink,
    "quantized": _quantized,
    "analog": AnalogUplink,
    "blind": _blind,
    "sketched": _sketched,
}
SCHEMES = {  # name → downlink and uplink
    "ideal": ("ideal", "ideal"),
    "downlink-selection": ("selection", "ideal"),
    "noisy-downlink": ("analog", "analog"),
    "blind": ("ideal", "blind"),
    "sketched": ("ideal", "sketched"),
}


def register(name: str, *, downlink: Maker = "ideal", uplink: Maker = "ideal") -> None:
    """Add a scheme; a link of it that is new is added under the same name.

    Args:
        name: of the scheme.
        downlink: a name in `DOWNLINKS`, or a maker.
        uplink: a name in `UPLINKS`, or a maker.

    Raises:
        ValueError: the name is taken.
    """
    if any(name in table for table in (DOWNLINKS, UPLINKS, SCHEMES)):
        raise ValueError(f"name must be that of no scheme or link yet, got {name!r}")
    names = []
    for table, link in ((DOWNLINKS, downlink), (UPLINKS, uplink)):
        known = isinstance(link, str) and link in table
        if not known:
            table[name] = link
        names.append(str(link) if known else name)
    SCHEMES[name] = (names[0], names[1])


def make_downlink(name: str, settings: Mapping[str, Any] | None = None, /, **known: Any) -> Downlink:
    """Make a downlink; see `make_uplink`. A run knows channel (a `Channel`) and participants (J)."""
    downlink: Downlink = _made(DOWNLINKS, word("downlink", name, DOWNLINKS), settings or {}, known)
    return downlink


def make_uplink(name: str, settings: Mapping[str, Any] | None = None, /, **known: Any) -> Uplink:
    """Make an uplink.

    Args:
        name: in `UPLINKS`.
        settings: arguments that its maker must take; they count more than what is known.
        known: arguments that it may take: channel (a `MultipleAccess` of one antenna), size (d), threshold, ….

    Raises:
        ValueError: no such name or setting, or a value out of range.
        TypeError: an argument is missing, or of another type.
    """
    uplink: Uplink = _made(UPLINKS, word("uplink", name, UPLINKS), settings or {}, known)
    return uplink


def _made(table: Mapping[str, Maker], name: str, settings: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """Call a maker with those of the arguments that it takes."""
    maker = table[name]
    make: Callable[..., Any] = pkgutil.resolve_name(maker) if isinstance(maker, str) else maker
    takes = inspect.signature(make).parameters
    for setting in settings:
        if setting not in takes:
            raise ValueError(f"settings of {name!r} must be {' or '.join(takes) or 'none'}, got {setting!r}")
    return make(**{argument: value for argument, value in {**known, **settings}.items() if argument in takes})


def read_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Read settings written as NAME=VALUE, numbers as numbers and everything else as words.

    Raises:
        ValueError: one is written otherwise.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"settings must be written NAME=VALUE, got {pair!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
