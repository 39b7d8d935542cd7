"""Open rows: a file, a folder of images, an array of vectors, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from federated.files import opening

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


def open_rows(source: str, split: str = "train") -> Iterable[Any]:
    """Open a data set: a file, a folder of images, or a name on the hub; files of text and tables are streamed.

    Args:
        source: a `json`, `jsonl`, `csv`, `tsv`, `parquet` or `txt` file, vectors in `npy`, a folder, or a name.
        split: of a data set on the hub or in a folder.

    Raises:
        ValueError: a file that isn't there, is empty or of an unknown kind, or data that can't be opened; or, while
            rows are read, a row that can't be.
    """
    with opening("the data set", source):
        rows = _open_rows(Path(source).expanduser(), source, split)
    return rows if hasattr(rows, "shape") else Named(rows, source)


class Named:
    """Rows whose reader's errors are sentences that name the source.

    Args:
        rows: any iterable of them.
        source: as the user gave it.
    """

    def __init__(self, rows: Iterable[Any], source: str) -> None:
        self.rows, self.source = rows, source

    def __iter__(self) -> Iterator[Any]:
        with opening("the data set", self.source):
            rows = iter(self.rows)
        while True:
            with opening("the data set", self.source):
                row = next(rows, _END)
            if row is _END:
                return
            yield row


_END = object()


def _open_rows(path: Path, source: str, split: str) -> Iterable[Any]:
    if path.is_file() and not path.stat().st_size:
        raise ValueError("it is empty")
    if path.suffix == ".npy":
        import numpy as np

        if not path.is_file():
            raise ValueError(f"the data file '{source}' does not exist")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if getattr(array, "ndim", 0) < 2 or array.dtype.kind not in "biuf":
            raise ValueError("it must hold an array of numbers with a row for each example")
        return array
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("data sets need datasets: pip install 'sgc[federated]'") from None
    if path.is_dir():
        return load_dataset("imagefolder", data_dir=str(path), split=split)
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise ValueError(f"the data file '{source}' does not exist")
        options = {"sep": "\t", "quoting": 3} if path.suffix == ".tsv" else {}
        builder = BUILDERS[path.suffix]
        return load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
    if path.suffix and path.exists():
        raise ValueError(f"data must be one of {', '.join(BUILDERS)}, .npy, a folder or a name, got '{source}'")
    return load_dataset(source, split=split)
