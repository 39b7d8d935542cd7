"""From a file, a folder, a pattern or a name on the hub to rows: what can't be read is a sentence with file and row.

Text formats are read here and not by `datasets`, whose loaders guess: they turn "007" into 7, a cell "None" into a
missing one and a row without a key into one where it is null, and name no row. No code of a data set ever runs.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import fsspec
from datasets import Dataset, DatasetDict, Features, Json, Value, concatenate_datasets, load_dataset, load_from_disk
from fsspec.utils import compressions

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SIMPLE = {str: "string", int: "int64", float: "float64", bool: "bool"}
DEEPEST = 100  # levels of lists and objects in a row
COMPRESSED = {f".{name}" for name in compressions} - {".zip"}  # which may hold several files
EVAL_SPLITS = ("validation", "dev", "valid", "val", "test", "eval", "validation_matched")


@dataclass
class Notes:
    """What was done to the data without being asked, counted, to be said aloud; and where the rows come from."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    opened: list[tuple[Dataset, list[tuple[str, int]]]] = field(default_factory=list)

    def count(self, what: str, reason: str, row: dict, number: int) -> None:
        """Count a row, and keep where the first of its kind is and why."""
        if not self.counts[what]:
            self.reasons[what] = f"{self.where(row, number)}: {reason}"
        self.counts[what] += 1

    def lines(self) -> list[str]:
        """Return one line per kind of change."""
        why = {what: f" (the first is {reason})" for what, reason in self.reasons.items()}
        return [f"{what}: {count:,}{why.get(what, '')}" for what, count in self.counts.items()]

    def left_out(self) -> str:
        """Return why rows were left out, as the end of a sentence."""
        return "".join(f"; {line}" for line in self.lines() if "left out" in line)

    def where(self, row: dict, number: int) -> str:
        """Return "row 3 of 'rows.jsonl'" for a row, or some of its columns, whatever became of the order since."""
        for rows, files in self.opened:
            if not row.keys() <= set(rows.column_names):
                continue
            found = next((i for i, other in enumerate(rows.select_columns(list(row))) if other == row), None)
            if found is not None:
                for name, length in files:
                    if found < length:
                        return f"row {found + 1} of '{name}'"
                    found -= length
        return f"row {number + 1}"


def read(source: str, *, config: str | None = None, notes: Notes | None = None) -> DatasetDict:
    """Open a file (by its ending), a folder, a pattern such as "parts/*.jsonl", or a data set of the hub.

    A folder is one that `Dataset.save_to_disk` wrote, or holds files whose names say which split they belong to, else
    all of them are training rows.

    Raises:
        ValueError: nothing is there, the ending is unknown, or a file can't be read.
    """
    notes = Notes() if notes is None else notes
    if not source.strip() or "\0" in source:
        raise ValueError(f"a data set must be a file, a folder, a pattern or a name on the hub, got {source!r}")
    try:
        path = Path(source).expanduser()
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return saved(path)
        if path.is_dir():
            return read_files(files_of_folder(path, notes), notes)
        if path.exists():
            return read_files({"train": [path]}, notes)
        if glob.has_magic(source) and (found := sorted(glob.glob(str(path), recursive=True))):
            return read_files({"train": readable(map(Path, found), source, notes)}, notes)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown user's home
        raise ValueError(f"data set '{source}' can't be opened: {error}") from None
    if glob.has_magic(source):
        raise ValueError(f"no data file is named as '{source}' says")
    if ending(path) in READERS or source.startswith((".", "/", "~")):
        raise ValueError(f"data file '{source}' does not exist")
    return from_hub(source, config)


def from_hub(name: str, config: str | None) -> DatasetDict:
    """Open a data set of the hub."""
    if os.environ.get("HF_HUB_OFFLINE") == "1" and name.count("/") > 1:
        raise ValueError(f"--dataset must be a local file or a name on the hub, got '{name}', which is neither")
    try:
        return load_dataset(name, config)
    except Exception as error:  # the hub, its client and every loader raise errors of their own: said, and the run ends
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"data set '{name}' is no local file, and the hub did not give it: {first}") from None


def saved(folder: Path) -> DatasetDict:
    """Open what `save_to_disk` wrote."""
    try:
        opened = load_from_disk(folder)
    except Exception as error:  # damaged files raise Arrow's errors, JSON's, KeyError and more
        raise ValueError(f"'{folder}' can't be read as what save_to_disk writes: {first_line(error)}") from None
    parts = opened if isinstance(opened, DatasetDict) else DatasetDict(train=opened)
    return parts.with_format(None)  # a format such as "torch" is saved along


def files_of_folder(folder: Path, notes: Notes) -> dict[str, list[Path]]:
    """Return split → files, as their names or else their folders say; if none is of a split, all are training data."""
    files: dict[str | None, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if ending(path) in READERS and path.is_file()):
        inner = path.relative_to(folder)
        if not any(part.startswith(".") for part in inner.parts):
            words = re.split("[^a-z]+", str(inner).lower())
            files.setdefault(next((SPLITS[word] for word in reversed(words) if word in SPLITS), None), []).append(path)
    if not files:
        raise ValueError(f"folder '{folder}' holds no file that ends in one of {', '.join(READERS)}")
    rest = files.pop(None, [])
    if "train" not in files and rest:
        files["train"] = rest
    elif rest:
        notes.counts[f"data files of '{folder}' whose names are of no split, not read"] += len(rest)
    if "train" not in files:
        raise ValueError(f"folder '{folder}' must hold train.jsonl (or {', '.join(READERS)}), got {sorted(files)}")
    return files


def readable(paths: Iterable[Path], source: str, notes: Notes) -> list[Path]:
    """Return the files of a known ending, and count the others."""
    files = [path for path in paths if path.is_file()]
    kept = [path for path in files if ending(path) in READERS]
    if not kept:
        raise ValueError(f"no file that '{source}' names ends in one of {', '.join(READERS)}")
    if len(kept) < len(files):
        notes.counts[f"files of '{source}' whose endings are of no data, not read"] += len(files) - len(kept)
    return kept


def ending(path: Path) -> str:
    """Return what a file's name ends in, without the ending of a compressed file."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def read_files(files: dict[str, list[Path]], notes: Notes) -> DatasetDict:
    """Read the files of every split."""
    parts: dict[str, Dataset] = {}
    for name, paths in files.items():
        for path in paths:
            check_file(path)
        if all(READERS[ending(path)] is None for path in paths):
            tables = [read_table(path) for path in paths]
            try:
                parts[name] = concatenate_datasets(tables)
            except ValueError as error:
                raise ValueError(
                    f"the files beside '{paths[0]}' differ in their columns: {first_line(error)}"
                ) from None
            notes.opened.append((parts[name], [(str(path), len(t)) for path, t in zip(paths, tables, strict=True)]))
            continue
        found: dict[str, list[tuple[Path, list[dict]]]] = {}
        for path in paths:
            for split, rows in read_file(path).items():  # a file may hold splits of its own
                found.setdefault(name if split == "train" else split, []).append((path, rows))
        for split, of_files in found.items():
            parts[split] = dataset_of(of_files)
            notes.opened.append((parts[split], [(str(path), len(rows)) for path, rows in of_files]))
    return DatasetDict(parts)


def read_table(path: Path) -> Dataset:
    """Open a file that holds one of Arrow's tables, without reading it into memory."""
    kind = ending(path).lstrip(".")
    try:
        return load_dataset(kind, data_files=glob.escape(str(path)), split="train")
    except Exception as error:  # a loader raises whatever its parser raises
        raise ValueError(
            f"data file '{path}' can't be read as {kind}: {first_line(error.__cause__ or error)}"
        ) from None


def check_file(path: Path) -> None:
    """Refuse what no reader could read."""
    if ending(path) not in READERS:
        raise ValueError(f"a data file must end in one of {', '.join(READERS)}, got '{path.name}'")
    if not path.is_file():
        raise ValueError(f"'{path}' is no file")
    if path.stat().st_size == 0:
        raise ValueError(f"data set '{path}' is empty")


def read_file(path: Path) -> dict[str, list[dict]]:
    """Return the rows of a file, by split; "train" where it names none."""
    kind = ending(path).lstrip(".")
    reader = READERS[f".{kind}"]
    if reader is None:
        return {"train": list(read_table(path))}
    try:
        with fsspec.filesystem("file").open(str(path), "rb", compression="infer") as file:
            text = file.read().decode("utf-8-sig")
        return reader(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"data file '{path}' is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"data file '{path}' can't be read as {kind}: it is nested too deeply") from None
    except Exception as error:  # the readers below say what is wrong, and each decompressor has errors of its own
        raise ValueError(f"data file '{path}' can't be read as {kind}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def dataset_of(files: list[tuple[Path, list[dict]]]) -> Dataset:
    """Make one data set of the rows of files; a row may lack a column, a column may hold values of several types."""
    rows = [row for _, of_file in files for row in of_file]
    try:
        return arrow_of(rows)
    except Exception as error:  # Arrow's errors are of many types, and name no row
        for path, of_file in files:
            for number, row in enumerate(of_file, 1):
                if (cause := objection(row)) is not None:
                    raise ValueError(f"row {number} of '{path}' can't be read: {first_line(cause)}") from None
        raise ValueError(f"the rows of '{files[0][0]}' can't be read: {first_line(error)}") from None


def objection(row: dict) -> Exception | None:
    """Return the error that a row by itself raises, as a number of more than 64 bits does."""
    try:
        arrow_of([row])
    except Exception as error:  # as in `dataset_of`
        return error
    return None


def arrow_of(rows: list[dict]) -> Dataset:
    """Make a data set whose rows are those given: a column of one simple type as it is, any other as JSON.

    As structs, Arrow would give every dict of a column the keys of all, and turn 1 beside 1.5 into 1.0.
    """
    columns: dict[str, list] = {}
    features: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        types = {type(value) for value in values} - {NoneType}
        if len(types) <= 1 and types <= SIMPLE.keys():
            features[name] = Value(SIMPLE[next(iter(types), str)])
        else:
            features[name] = Json()
            values = [None if value is None else as_json(value) for value in values]
        columns[name] = values
    return Dataset.from_dict(columns, features=Features(features))


def as_json(value: Any) -> str:
    """Return a value as JSON.

    Raises:
        ValueError: it is nested more deeply than what reads it later may be.
    """
    check_depth(value)
    return json.dumps(value, ensure_ascii=False)


def from_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Refuse what is nested more deeply than functions may call themselves, who read it later."""
    level = [value]
    for _ in range(DEEPEST):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list)))
        level = [value for part in inner for value in part]
    if level:
        raise ValueError("it is nested too deeply")


# ---------------------------------------------------------------------------------------------- formats of text


def json_rows(text: str, *, lines: bool = False) -> dict[str, list[dict]]:
    """Return the rows of a JSON list, of lines, or of an object that holds them, as columns or as splits."""
    values = list(json_values(text))
    if len(values) == 1 and isinstance(values[0], dict) and not lines:
        return rows_within(values[0])
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    return {"train": checked(rows)}


def json_values(text: str) -> Iterator[Any]:
    """Yield every value: one a line, or each written over several lines."""
    lines = text.split("\n")
    try:
        json.loads(next((line for line in lines if line.strip()), ""))
    except ValueError:  # the first value goes on in the next line
        decoder, at = json.JSONDecoder(), 0
        while (at := re.compile(r"\s*").match(text, at).end()) < len(text):
            value, at = decoder.raw_decode(text, at)
            yield value
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield parsed_line(line, number)


def parsed_line(line: str, number: int) -> Any:
    """Return the value that a line holds."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at character {error.colno}") from None
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"line {number}: {error}") from None


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in value)
    )


def rows_within(value: dict) -> dict[str, list[dict]]:
    """Return the rows that one object holds: {"data": [rows]}, splits, columns, or itself."""
    inner = {name: part for name, part in value.items() if isinstance(part, (list, dict))}
    lists = {n: p for n, p in inner.items() if isinstance(p, list) and p and all(isinstance(row, dict) for row in p)}
    if any(map(is_messages, inner.values())):
        return {"train": [value]}
    if isinstance(value.get("train"), list):
        return {name: checked(part) for name, part in value.items() if name == "train" or name in lists}
    if len(lists) == 1:
        return {"train": next(iter(lists.values()))}
    if lists:
        raise ValueError(f"it holds several lists of rows, {', '.join(lists)}, and none is named train")
    columns = [list(part.values()) if isinstance(part, dict) else part for part in inner.values()]
    if columns and len(inner) == len(value) and len({len(column) for column in columns}) == 1:
        return {"train": [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]}
    return {"train": [value]}


def checked(rows: list) -> list[dict]:
    """Return rows that are objects; texts become rows with a text."""
    if rows and all(isinstance(row, str) for row in rows):
        return [{"text": row} for row in rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} must be an object with named values, got {shortened(json.dumps(row))}")
    return rows


def shortened(text: str, length: int = 200) -> str:
    """Return a text, or its beginning and end."""
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"


def csv_rows(text: str, *, tabs: bool = False) -> dict[str, list[dict]]:
    """Return the rows of a table; a cell is the text that stands there. The header shows what parts the cells."""
    header = text.split("\n", 1)[0]
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # tables with tabs, as GLUE's, use quotes as plain text
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    mark = "\t" if tabs else max(",;\t|", key=header.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=mark, quoting=quoting, strict=True)
    rows: list[dict] = []
    try:
        names = next(table, [])
        if len(set(names)) < len(names):
            raise ValueError(f"the columns must have different names, got {', '.join(names)}")
        for cells in table:
            if cells and len(cells) != len(names):
                raise ValueError(f"line {table.line_num} has {len(cells)} cells, and the header {len(names)}")
            if cells:
                rows.append(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"line {table.line_num}: {error}") from None
    return {"train": rows}


def paragraphs(text: str) -> dict[str, list[dict]]:
    """Return the parts of a text between empty lines."""
    parts = text.replace("\r\n", "\n").split("\n\n")
    return {"train": [{"text": part} for part in parts if part]}


# ending → its reader; `datasets` opens those without one, which lie on the disk as they lie in memory
READERS: dict[str, Callable[[str], dict[str, list[dict]]] | None] = {
    ".json": json_rows,
    ".jsonl": partial(json_rows, lines=True),
    ".ndjson": partial(json_rows, lines=True),
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, tabs=True),
    ".txt": paragraphs,
    ".text": paragraphs,
    ".parquet": None,
    ".arrow": None,
}
