"""Rows → vectors: any data set through an extractor, streaming, with a cache on disk.

An extractor has a fingerprint (`encoder`), which goes into the query and is compared, and `embed(rows)`. Files of the
cache are named by digests of encoder and content: rows that were embedded by this encoder are not embedded again,
whatever the data set is called.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from federated.files import sentence
from federated.market.encoders import ArrayFeatures, HuggingFaceFeatures, PixelFeatures
from federated.market.fingerprint import Encoder, content_digest
from federated.market.gradients import GradientFeatures
from federated.market.rows import Named, open_rows

__all__ = [
    "ArrayFeatures", "Extractor", "GradientFeatures", "HuggingFaceFeatures", "PixelFeatures",
    "batches", "features", "make_extractor", "naming", "open_rows",
]  # fmt: skip

SHARD_ROWS = 256  # rows read, embedded and cached together


class Extractor(Protocol):
    """What makes vectors of rows."""

    @property
    def encoder(self) -> Encoder:
        """The fingerprint, which both sides must share."""

    @property
    def whole_rows(self) -> bool:
        """Whether it reads all columns of a row, and not one."""

    def embed(self, rows: Sequence[Any]) -> Tensor:
        """Embed rows: (m, D) fp32."""


def batches(
    extractor: Extractor,
    dataset: Iterable[Any],
    *,
    columns: str | Sequence[str] | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Embed a data set, 256 rows at a time.

    Args:
        extractor: makes the vectors.
        dataset: a `datasets.Dataset` or `IterableDataset`, or any iterable of rows.
        columns: of rows that are dicts, the one to embed, or for gradients those that the model is to be given; None
            takes the only column but "label", or all of them for gradients.
        cache: a folder, or None for none.
        progress: show a bar on the terminal.

    Yields:
        (m, D) fp32.

    Raises:
        ValueError: rows without such a column, or of another kind than the extractor reads.
    """
    from tqdm import tqdm

    folder = None if cache is None else Path(cache).expanduser() / extractor.encoder.identifier[:32]
    held = dataset.rows if isinstance(dataset, Named) else dataset
    total = len(held) if isinstance(held, Sized) else None
    with tqdm(total=total, unit=" rows", desc=extractor.encoder.name, disable=None if progress else True) as bar:
        rows = iter(dataset)
        while shard := [_pick(row, columns, extractor.whole_rows) for row in islice(rows, SHARD_ROWS)]:
            yield _cached(extractor, shard, folder)
            bar.update(len(shard))


def naming(stream: Iterable[Tensor], source: str) -> Iterator[Tensor]:
    """Yield the vectors of `batches`; an error about them names the data, and data without a row are an error.

    Args:
        stream: of `batches`.
        source: as the user gave it.

    Raises:
        ValueError: as `batches`, or there is no row.
    """
    rows = 0
    try:
        for x in stream:
            rows += len(x)
            yield x
        if not rows:
            raise ValueError("the data must have rows, got none")
    except ValueError as error:
        text = sentence(error)
        raise ValueError(text if source in text else f"{text}: '{source}'") from None


def features(extractor: Extractor, dataset: Iterable[Any], **kwargs: Any) -> Tensor:
    """Embed a data set that fits into memory: (n, D). Arguments and errors as in `batches`."""
    parts = list(batches(extractor, dataset, **kwargs))
    return torch.cat(parts) if parts else torch.empty(0, extractor.encoder.dimension)


def _pick(row: Any, columns: str | Sequence[str] | None, whole: bool) -> Any:
    if not isinstance(row, dict):
        return row
    if columns is None:
        names = [name for name in row if whole or name not in ("label", "labels")] or list(row)
    else:
        names = [columns] if isinstance(columns, str) else list(columns)
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"there is no column {missing[0]!r}, only {', '.join(map(repr, row))}")
    if whole:
        return {name: row[name] for name in names}
    if len(names) != 1:
        raise ValueError(f"one column must be chosen among {', '.join(map(repr, row))}")
    return row[names[0]]


def _cached(extractor: Extractor, rows: list[Any], folder: Path | None) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if folder is None:
        return _checked(extractor, rows)
    path = folder / f"{content_digest(rows)}.safetensors"
    with contextlib.suppress(FileNotFoundError, SafetensorError, KeyError, OSError):  # what is not whole is made anew
        held = load_file(path)["x"]
        whole = held.dtype == torch.float32 and bool(torch.isfinite(held).all())
        if whole and held.shape == (len(rows), extractor.encoder.dimension):
            return held
    x = _checked(extractor, rows)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"x": x.contiguous()}, part)
    os.replace(part, path)
    return x


def _checked(extractor: Extractor, rows: list[Any]) -> Tensor:
    x = extractor.embed(rows)
    if x.shape != (len(rows), extractor.encoder.dimension):
        raise ValueError(
            f"{extractor.encoder.name} must give {len(rows)} vectors of {extractor.encoder.dimension}, "
            f"got {tuple(x.shape)}"
        )
    return x.float().cpu()


def make_extractor(name: str, *, dimension: int | None = None, normalize: bool = True, **options: Any) -> Extractor:
    """Make the extractor of a name: "pixels" or "pixels:SIZE", "vectors" (as they are), else a Hugging Face encoder.

    Args:
        name: of the extractor.
        dimension: of "vectors".
        normalize: scale rows to unit norm.
        options: of `HuggingFaceFeatures`.

    Raises:
        ValueError: a size that is no number, or "vectors" without a dimension.
    """
    if re.fullmatch(r"pixels(:\d{1,4})?", name):
        return PixelFeatures(int(name.partition(":")[2] or 28), normalize=normalize)
    if name == "vectors":
        if dimension is None:
            raise ValueError("vectors need a dimension")
        return ArrayFeatures(dimension, normalize=normalize)
    return HuggingFaceFeatures(name, normalize=normalize, **options)
