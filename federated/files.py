"""Paths and names that people give: a path that can't be written or read is refused before any work, in a sentence."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

WIDEST = 400  # characters of another program's sentence that are passed on


def sentence(error: BaseException) -> str:
    """Return on one line what went wrong: an error's first line, or what the system says and about which file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"'{os.fsdecode(error.filename)}': {error.strerror}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:WIDEST]


@contextlib.contextmanager
def opening(what: str, name: str | Path) -> Iterator[None]:
    """Raise any error in opening something as a sentence that names it.

    Args:
        what: "the model", "the data set", …
        name: as it was given.

    Raises:
        ValueError: in the place of any error but one of a missing package.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # readers of weights, tokenizers, tables and pictures raise whatever their parsers raise
        hint = "; --trust_remote_code runs it" if "trust_remote_code" in str(error) else ""
        raise ValueError(f"{what} '{name}' can't be opened: {sentence(error.__cause__ or error)}{hint}") from error


def rows_of(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Read a file of rows, a JSON object in each line; a last line that was cut off is left out.

    Args:
        path: of the file.
        fields: what every row must have, and of which type.

    Raises:
        ValueError: a line is anything else; the sentence names the file and the line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in fields.items()):
            raise ValueError(f"every line of '{path}' must be a row with {', '.join(fields)}, line {number} is none")
        rows.append(row)
    return rows


def line_of(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON, which has no word for what is not finite: null."""
    held = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(held, allow_nan=False) + "\n"


def check_folder(path: Path, what: str) -> None:
    """Check that a folder is there to write into, or can be made.

    Args:
        path: of the folder.
        what: the argument that names it.

    Raises:
        ValueError: something else is there or above it, or it may not be written.
    """
    near = _nearest(path, what)
    if not near.is_dir():
        raise ValueError(f"{what} must be a folder to write into, got '{path}': '{near}' is a file")
    if not os.access(near, os.W_OK | os.X_OK):
        raise ValueError(f"{what} must be a folder to write into, got '{path}': '{near}' may not be written")


def check_file(path: Path, what: str) -> None:
    """Check that a file can be written, in a folder that is there; arguments and errors as in `check_folder`."""
    near = _nearest(path, what)
    if near == path and path.is_dir():
        raise ValueError(f"{what} must be a file to write, got '{path}', which is a folder")
    if near not in (path, path.parent) or not path.parent.is_dir():
        raise ValueError(f"{what} must be a file in a folder that is there, got '{path}'")
    if not os.access(near.parent if near == path else near, os.W_OK | os.X_OK):
        raise ValueError(f"{what} must be a file that may be written, got '{path}'")


def check_apart(paths: Mapping[str, str | Path | None], written: Iterable[str]) -> None:
    """Check that what a command writes lies over nothing else that it reads or writes.

    Args:
        paths: files by the argument that names them; None: it was not given.
        written: the arguments whose files are written.

    Raises:
        ValueError: two arguments name one file; the sentence names both.
    """
    places = {name: os.path.realpath(path) for name, path in paths.items() if path is not None}
    for name in written:
        for other, place in places.items():
            if other != name and places.get(name) == place:
                raise ValueError(f"{name} must be another file than {other}, got '{paths[name]}' for both")


def _nearest(path: Path, what: str) -> Path:
    """Find what is there of a path: itself, or the folder nearest to it."""
    for each in (path, *path.parents):
        try:
            os.stat(each)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
            raise ValueError(f"{what} must be a path that can be written: {sentence(error)}") from None
        return each
    return Path()
