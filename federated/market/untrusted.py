"""Read what a stranger sent: sizes, types and bounds are checked, and a fault is a ValueError with a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

VERSION = 1
MAX_DIMENSION, MAX_DIRECTIONS, MAX_ROWS = 1 << 16, 256, 1 << 53
MAX_QUERY_BYTES = MAX_DIMENSION * MAX_DIRECTIONS * 4 + (1 << 16)
MAX_RESPONSE_BYTES = MAX_DIRECTIONS**2 * 26 + (1 << 16)  # a float64 has at most 24 characters

T = TypeVar("T")


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=".sgc-market-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _read_limited(path: Path, kind: str, limit: int) -> bytes:
    if not path.is_file():  # a pipe or a device would never end
        raise ValueError(f"the {kind} '{path}' is no file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"a {kind} must have at most {limit} bytes, got {path.stat().st_size}: '{path}'")
    return data


def read_file(path: str | Path, kind: str, limit: int, read: Callable[[bytes], T]) -> T:
    """Read a file of at most `limit` bytes; a ValueError of `read` names the file."""
    data = _read_limited(Path(path), kind, limit)
    try:
        return read(data)
    except ValueError as error:
        raise ValueError(f"{error}: '{path}'") from None


def read_tensors(data: bytes, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a safetensors file, and the JSON object in its metadata that is the market's."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the {kind} is no safetensors file: {short(error)}") from None
    end = 8 + int.from_bytes(data[:8], "little")
    metadata = parse(data[8:end], kind).get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("sgc_market"), str):
        raise ValueError(f"this is no {kind}: it lacks the 'sgc_market' entry")
    return tensors, parse(metadata["sgc_market"], kind)


def parse(text: bytes | str, kind: str) -> dict[str, Any]:
    """Read a JSON object, in which no name comes twice and every number is finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        record = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {kind} is no JSON as it must be: {short(error)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"the {kind} must be a JSON object, got {type(record).__name__}")
    return record


def check_fields(record: dict[str, Any], names: set[str], kind: str) -> None:
    """Check that an object is of a kind, of this version, and has exactly its fields."""
    if record.get("kind") != kind:
        raise ValueError(f"this must be a {kind}, got {short(record.get('kind'))}")
    if type(record.get("version")) is not int or record["version"] != VERSION:
        raise ValueError(f"a {kind} must have version {VERSION}, got {short(record.get('version'))}")
    if set(record) != names:
        odd = sorted(set(record) ^ names)[0]
        raise ValueError(f"a {kind} must have exactly the fields it has, but {short(odd)} is missing or too many")


def number(value: Any, name: str) -> float:
    """Return a finite number that is not negative as a float."""
    # NaN fails the comparison, and squares must not overflow
    if type(value) not in (int, float) or not 0 <= value <= 1e150:
        raise ValueError(f"'{name}' must be a finite number, not negative, got {short(value)}")
    return float(value)


def vector(value: Any, name: str, length: int | None) -> Tensor:
    """Return a list of finite numbers, `length` of them where it is given, as a float64 tensor."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_DIRECTIONS or length not in (None, len(value)):
        raise ValueError(f"'{name}' must be a list of {length or f'1 to {MAX_DIRECTIONS}'} numbers")
    if not all(type(x) in (int, float) and abs(x) <= 1e150 for x in value):
        raise ValueError(f"'{name}' must hold finite numbers alone")
    return torch.tensor([float(x) for x in value], dtype=torch.float64)


def matching(value: Any, name: str, pattern: str) -> str:
    """Return a text that matches a pattern from end to end."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"'{name}' must match {pattern}, got {short(value)}")
    return value


def printable(value: Any, name: str) -> str:
    """Check a name for people: short, and nothing in it that a terminal would obey."""
    if not isinstance(value, str) or not 1 <= len(value) <= 64 or not value.isprintable():
        raise ValueError(f"'{name}' must be 1 to 64 printable characters, got {short(value)}")
    return value


def short(value: Any) -> str:
    """Return what a stranger sent as a sentence shows it: short, and escaped."""
    text = ascii(value if isinstance(value, (str, int, float, bool, type(None))) else str(value))
    return text if len(text) <= 60 else f"{text[:57]}…"
