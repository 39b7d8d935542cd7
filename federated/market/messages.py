"""What travels: the buyer's query and a seller's response; and the key, which never leaves the buyer. (ours)

A query is a safetensors file, a response JSON that its sender can read. Both are safe to open from a stranger: the size
is judged before anything is read, nothing is executed, every field has a type and a bound, and what is wrong is a
ValueError with a sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from federated.market.fingerprint import Encoder
from federated.market.moments import Moments
from federated.market.untrusted import (
    MAX_DIMENSION,
    MAX_DIRECTIONS,
    MAX_QUERY_BYTES,
    MAX_RESPONSE_BYTES,
    MAX_ROWS,
    VERSION,
    check_fields,
    matching,
    number,
    parse,
    printable,
    read_file,
    read_tensors,
    short,
    vector,
    write_whole,
)

ORTHONORMAL = 1e-4  # largest entry of QᵀQ − I, in fp32


@dataclass(frozen=True)
class BuyerQuery:
    """What every seller may see: an orthonormal basis, and how to embed.

    Args:
        directions: (D, K) fp32 with orthonormal columns.
        encoder: the fingerprint.
    """

    directions: Tensor
    encoder: Encoder

    def __post_init__(self) -> None:
        shape = tuple(self.directions.shape)
        if len(shape) != 2 or self.directions.dtype is not torch.float32:
            raise ValueError(f"directions must be (D, K) in float32, got {self.directions.dtype} of shape {shape}")
        if shape[0] != self.encoder.dimension or not 1 <= shape[1] <= min(MAX_DIRECTIONS, shape[0]):
            raise ValueError(
                f"directions must be (dimension={self.encoder.dimension}, 1 to {MAX_DIRECTIONS} columns and no more "
                f"than that), got {shape}"
            )
        gram = self.directions.T @ self.directions
        error = float((gram - torch.eye(shape[1])).abs().max())
        if not error <= ORTHONORMAL:  # NaN too; longer columns would make the seller's noise too small
            raise ValueError(f"directions must be orthonormal, got columns off by {error:.3g}")

    @property
    def identifier(self) -> str:
        """A digest of the content, so that an answer to an altered query is known as such."""
        content = hashlib.sha256(self.directions.contiguous().numpy().tobytes())
        content.update(json.dumps(asdict(self.encoder), sort_keys=True).encode())
        return content.hexdigest()

    def to_bytes(self) -> bytes:
        """Return the file's content, safetensors."""
        from safetensors.torch import save

        metadata = {"sgc_market": json.dumps({"kind": "query", "version": VERSION, "encoder": asdict(self.encoder)})}
        return save({"directions": self.directions.contiguous()}, metadata)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        write_whole(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> BuyerQuery:
        """Read a query, from whomever it may come.

        Raises:
            ValueError: anything in the file is not as it must be.
        """
        return read_file(path, "query", MAX_QUERY_BYTES, cls.from_bytes)

    @classmethod
    def from_bytes(cls, data: bytes) -> BuyerQuery:
        """Read the file's content; raises as `load`."""
        if len(data) > MAX_QUERY_BYTES:
            raise ValueError(f"a query must have at most {MAX_QUERY_BYTES} bytes, got {len(data)}")
        tensors, header = read_tensors(data, "query")
        check_fields(header, {"kind", "version", "encoder"}, "query")
        if set(tensors) != {"directions"}:
            raise ValueError(f"a query must hold one tensor, 'directions', got {len(tensors)} tensors")
        return cls(tensors["directions"], _encoder(header["encoder"]))


@dataclass(frozen=True)
class SellerResponse:
    """A seller's answer: numbers only.

    Args:
        query: identifier of the query that it answers.
        seller: its name, at most 64 printable characters.
        moments: along the query's directions, with row count and standard errors.
        epsilon: of the privacy spent on this answer, or None where nothing was added.
        delta: the same.
    """

    query: str
    seller: str
    moments: Moments
    epsilon: float | None = None
    delta: float | None = None

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        write_whole(Path(path), self.to_json().encode())

    def to_json(self) -> str:
        """Return the file's text."""
        m = self.moments
        return json.dumps(
            {
                "kind": "response",
                "version": VERSION,
                "query": self.query,
                "seller": self.seller,
                "rows": m.rows,
                "mean": m.mean.tolist(),
                "second": m.second.tolist(),
                "energy": m.energy,
                "variance_se": m.variance_se.tolist(),
                "energy_se": m.energy_se,
                "mean_noise": m.mean_noise,
                "second_noise": m.second_noise,
                "epsilon": self.epsilon,
                "delta": self.delta,
            }
        )

    @classmethod
    def load(cls, path: str | Path) -> SellerResponse:
        """Read a response, from whomever it may come.

        Raises:
            ValueError: anything in the file is not as it must be.
        """
        return read_file(path, "response", MAX_RESPONSE_BYTES, cls.from_json)

    @classmethod
    def from_json(cls, text: bytes | str) -> SellerResponse:
        """Read the file's text; raises as `load`."""
        if len(text) > MAX_RESPONSE_BYTES:
            raise ValueError(f"a response must have at most {MAX_RESPONSE_BYTES} bytes, got {len(text)}")
        record = parse(text, "response")
        check_fields(
            record,
            {"kind", "version", "query", "seller", "rows", "mean", "second", "energy", "variance_se", "energy_se"}
            | {"mean_noise", "second_noise", "epsilon", "delta"},
            "response",
        )
        mean = vector(record["mean"], "mean", None)
        k = len(mean)
        if not isinstance(record["second"], list) or len(record["second"]) != k:
            raise ValueError(f"'second' must be a list of {k} rows")
        second = torch.stack([vector(row, "second", k) for row in record["second"]])
        if not torch.equal(second, second.T):
            raise ValueError("'second' must be symmetric")
        variance_se = vector(record["variance_se"], "variance_se", k)
        if bool((variance_se < 0).any()):
            raise ValueError("'variance_se' must not be negative")
        rows = record["rows"]
        if type(rows) is not int or not 2 <= rows <= MAX_ROWS:
            raise ValueError(f"'rows' must be a whole number from 2 to 2**53, got {short(rows)}")
        moments = Moments(
            rows,
            mean,
            second,
            number(record["energy"], "energy"),
            variance_se,
            *(number(record[name], name) for name in ("energy_se", "mean_noise", "second_noise")),
        )
        epsilon, delta = (None if record[name] is None else number(record[name], name) for name in ("epsilon", "delta"))
        _plausible(moments, epsilon, delta)
        return cls(
            matching(record["query"], "query", r"[0-9a-f]{64}"),
            printable(record["seller"], "seller"),
            moments,
            epsilon,
            delta,
        )


@dataclass(frozen=True)
class BuyerKey:
    """What the buyer keeps: how the basis was turned, and its own moments. Not for sending.

    Args:
        query: identifier.
        rotation: (K, K); `query.directions @ rotation` is [mean direction, v₁…v_κ, decoys].
        decoys: J, how many of the last columns are decoys.
        moments: the buyer's along all K, in that order.
        dimension: D.
        normalize: whether the encoder makes rows of unit norm.
    """

    query: str
    rotation: Tensor
    decoys: int
    moments: Moments
    dimension: int
    normalize: bool

    @property
    def directions(self) -> int:
        """κ + 1: the directions that are not decoys."""
        return len(self.rotation) - self.decoys

    def buyer(self) -> Moments:
        """Return the buyer's moments along its own directions, decoys left out."""
        return self.moments.first(self.directions)

    def turned(self, response: SellerResponse) -> Moments:
        """Turn an answer back: its moments along [mean direction, v₁…v_κ, decoys].

        Raises:
            ValueError: it answers another query.
        """
        if response.query != self.query:
            raise ValueError(f"{response.seller!r} answers another query, or an altered one: {response.query[:12]}…")
        if len(response.moments.mean) != len(self.rotation):
            raise ValueError(
                f"{response.seller!r} must answer {len(self.rotation)} directions, got {len(response.moments.mean)}"
            )
        return response.moments.turned(self.rotation)

    def seller(self, response: SellerResponse) -> Moments:
        """Return a seller's moments along the buyer's directions, decoys left out; raises as `turned`."""
        return self.turned(response).first(self.directions)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that only its owner may read."""
        from safetensors.torch import save

        m = self.moments
        header = {"kind": "key", "version": VERSION, "query": self.query, "decoys": self.decoys, "rows": m.rows}
        header |= {"dimension": self.dimension, "energy": m.energy, "energy_se": m.energy_se}
        header |= {"normalize": self.normalize}
        tensors = {"rotation": self.rotation, "mean": m.mean, "second": m.second, "variance_se": m.variance_se}
        data = save({name: x.contiguous() for name, x in tensors.items()}, {"sgc_market": json.dumps(header)})
        write_whole(Path(path), data, mode=0o600)

    @classmethod
    def load(cls, path: str | Path) -> BuyerKey:
        """Read a key; raises ValueError as `BuyerQuery.load` does."""
        return read_file(path, "key", MAX_QUERY_BYTES, cls._from_bytes)

    @classmethod
    def _from_bytes(cls, data: bytes) -> BuyerKey:
        tensors, header = read_tensors(data, "key")
        names = {"kind", "version", "query", "decoys", "rows", "dimension", "energy", "energy_se", "normalize"}
        check_fields(header, names, "key")
        if set(tensors) != {"rotation", "mean", "second", "variance_se"}:
            raise ValueError("a key must hold rotation, mean, second and variance_se")
        t = {name: x.double() for name, x in tensors.items()}
        k = len(t["mean"])
        shapes = {"rotation": (k, k), "mean": (k,), "second": (k, k), "variance_se": (k,)}
        for name, shape in shapes.items():
            if tuple(t[name].shape) != shape:
                raise ValueError(f"a key's '{name}' must have the shape {shape}, got {tuple(t[name].shape)}")
            if not torch.isfinite(t[name]).all():
                raise ValueError(f"a key's '{name}' must be finite")
        if not float((t["rotation"].T @ t["rotation"] - torch.eye(k)).abs().max()) <= ORTHONORMAL:
            raise ValueError("a key's 'rotation' must be orthogonal")
        counts = {name: header[name] for name in ("rows", "decoys", "dimension")}
        if not all(type(n) is int and 0 <= n <= MAX_ROWS for n in counts.values()) or not counts["decoys"] < k:
            raise ValueError(f"a key's rows, decoys and dimension must be counts, got {short(counts)}")
        if type(header["normalize"]) is not bool:
            raise ValueError(f"a key's 'normalize' must be true or false, got {short(header['normalize'])}")
        energy, energy_se = (number(header[name], name) for name in ("energy", "energy_se"))
        moments = Moments(counts["rows"], t["mean"], t["second"], energy, t["variance_se"], energy_se)
        query = matching(header["query"], "query", r"[0-9a-f]{64}")
        return cls(query, t["rotation"], counts["decoys"], moments, counts["dimension"], header["normalize"])


def _plausible(moments: Moments, epsilon: float | None, delta: float | None) -> None:
    """Raise ValueError for numbers with which scores can't be computed, and noise that nothing accounts for."""
    m, energy = moments, moments.energy
    if not 1e-60 <= energy <= 1e60:
        raise ValueError(f"'energy' must be from 1e-60 to 1e60, got {energy:g}")
    for name, size, scale in (
        ("mean", float(m.mean.abs().max()), math.sqrt(energy)), ("second", float(m.second.abs().max()), energy),
        ("variance_se", float(m.variance_se.max()), energy), ("energy_se", m.energy_se, energy),
        ("mean_noise", m.mean_noise, math.sqrt(energy)), ("second_noise", m.second_noise, energy),
    ):  # fmt: skip
        if not size <= 1e12 * scale:
            raise ValueError(f"'{name}' must be on the scale of an energy of {energy:g}, got {size:g}")
    if (epsilon is None) != (delta is None) or epsilon == 0 or (delta is not None and not 0 < delta < 1):
        raise ValueError(f"'epsilon' and 'delta' must be a budget or both null, got {epsilon} and {delta}")
    if (epsilon is None) != (m.mean_noise == 0) or (m.mean_noise == 0) != (m.second_noise == 0):
        raise ValueError("noise must be stated with the 'epsilon' that it buys, and 'epsilon' with its noise")


def _encoder(record: Any) -> Encoder:
    if not isinstance(record, dict) or set(record) != {field.name for field in fields(Encoder)}:
        raise ValueError("'encoder' must have name, digest, pooling, normalize and dimension, and nothing else")
    dimension = record["dimension"]
    if type(dimension) is not int or not 1 <= dimension <= MAX_DIMENSION:
        raise ValueError(f"'dimension' must be a whole number from 1 to {MAX_DIMENSION}, got {short(dimension)}")
    if type(record["normalize"]) is not bool:
        raise ValueError(f"'normalize' must be true or false, got {short(record['normalize'])}")
    return Encoder(
        printable(record["name"], "name"),
        matching(record["digest"], "digest", r"[0-9a-f]{64}"),
        printable(record["pooling"], "pooling"),
        record["normalize"],
        dimension,
    )
