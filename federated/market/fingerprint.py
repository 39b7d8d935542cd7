"""Fingerprints: of how rows become vectors, which both sides must share, and of the rows, for the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoder:
    """The fingerprint of how rows became vectors: equal on both sides, or the scores mean nothing.

    Args:
        name: for people; not compared.
        digest: hexadecimal SHA-256 of all that determines the vectors (weights, configuration, preprocessing).
        pooling: how a row's hidden states become one vector.
        normalize: whether rows have unit norm.
        dimension: D.
    """

    name: str
    digest: str
    pooling: str
    normalize: bool
    dimension: int

    @property
    def identifier(self) -> str:
        """A digest of all that is compared."""
        compared = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}
        return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()

    def check(self, other: Encoder) -> None:
        """Raise ValueError where another fingerprint differs from this one."""
        for field in fields(self):
            wanted, got = getattr(self, field.name), getattr(other, field.name)
            if field.name != "name" and wanted != got:
                raise ValueError(
                    f"both sides must use the same encoder: the query's {field.name} is {wanted!r} ({self.name}), "
                    f"got {got!r} ({other.name})"
                )


def digest_of(description: dict[str, Any], state: dict[str, Tensor] | None = None) -> str:
    """Compute SHA-256 of what determines the vectors: settings, and weights by name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    for name, weight in sorted((state or {}).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Return all that determines which tokens a text becomes: vocabulary, merges, normalisation, special tokens."""
    settings: dict[str, Any] = {
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
    }
    settings["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        steps = json.loads(backend.to_str())
        return settings | {name: x for name, x in steps.items() if name not in ("truncation", "padding")}
    return settings | {
        "init": {k: str(v) for k, v in tokenizer.init_kwargs.items() if "path" not in k and "file" not in k}
    }


def config_settings(config: Any) -> dict[str, Any]:
    """Return the part of a model's configuration that determines its vectors."""
    passing = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "id2label", "label2id")
    return {name: value for name, value in config.to_dict().items() if name not in passing}


def content_digest(rows: list[Any]) -> str:
    """Compute SHA-256 of the content of rows."""
    digest = hashlib.sha256()
    for row in rows:
        for part in _content(row):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _content(row: Any) -> Iterator[bytes]:
    """Yield a row's content as bytes, each part with its type, so that different rows never look the same."""
    if isinstance(row, dict):
        yield f"dict {len(row)}".encode()
        for key in sorted(row):
            yield from (b"key", str(key).encode())
            yield from _content(row[key])
    elif isinstance(row, str):
        yield from (b"text", row.encode("utf-8", "surrogatepass"))
    elif isinstance(row, (int, float)):
        yield from (b"number", repr(row).encode())
    elif isinstance(row, Tensor):
        yield from (f"tensor {row.dtype} {tuple(row.shape)}".encode(), row.contiguous().cpu().numpy().tobytes())
    elif hasattr(row, "dtype") and hasattr(row, "tobytes") and not row.dtype.hasobject:  # numpy
        yield from (f"array {row.dtype} {row.shape}".encode(), row.tobytes())
    elif hasattr(row, "getpalette") and hasattr(row, "tobytes"):  # PIL; a memory-mapped array has a mode, too
        yield from (f"image {row.mode} {row.size}".encode(), row.tobytes(), bytes(row.getpalette() or ()))
    elif isinstance(row, (list, tuple)):
        yield f"list {len(row)}".encode()
        for value in row:
            yield from _content(value)
    else:
        raise ValueError(f"a row must be text, an image, numbers or a dict of those, got {type(row).__name__}")
