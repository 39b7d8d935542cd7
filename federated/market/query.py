"""What travels: the buyer's query, a seller's response, and the key that never leaves the buyer. (ours)

The buyer's directions [mean direction, v₁…v_κ, decoys] are sent as one rotated orthonormal basis. So the file holds no
eigenvalue, no order and no sign; what is a decoy can't be told from what is not; and who does not know the rotation
can't make up an answer that fits. The moments along the true directions come back by turning the answer.

A query is a safetensors file, a response JSON that its sender can read. Both are safe to open from a stranger: the size
is judged before anything is read, nothing is executed, every field has a type and a bound, and what is wrong is a
ValueError with a sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from federated.market.score import Moments, StreamingMoments, moments_along
from sgc.checks import whole

VERSION = 1
DIRECTIONS = 10  # κ, without the mean direction and the decoys
DECOYS = 8
ROWS_PER_DIRECTION = 4  # fewer rows than that, and moments come near to being the rows themselves
MAX_DIMENSION, MAX_DIRECTIONS, MAX_ROWS = 1 << 16, 256, 1 << 53
MAX_QUERY_BYTES = MAX_DIMENSION * MAX_DIRECTIONS * 4 + (1 << 16)
MAX_RESPONSE_BYTES = MAX_DIRECTIONS**2 * 26 + (1 << 16)  # a float64 has at most 24 characters
ORTHONORMAL = 1e-4  # largest entry of QᵀQ − I, in fp32


@dataclass(frozen=True)
class Encoder:
    """The fingerprint of how rows became vectors: equal on both sides, or the scores mean nothing.

    Args:
        name: for people; not compared.
        digest: hexadecimal SHA-256 of all that decides about the numbers (weights, configuration, preprocessing).
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
        """Raise ValueError with a sentence where another fingerprint differs from this one."""
        for field in fields(self):
            wanted, got = getattr(self, field.name), getattr(other, field.name)
            if field.name != "name" and wanted != got:
                raise ValueError(
                    f"both sides must use the same encoder: the query's {field.name} is {wanted!r} ({self.name}), "
                    f"got {got!r} ({other.name})"
                )


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
        """Give the file's content, safetensors."""
        from safetensors.torch import save

        metadata = {"sgc_market": json.dumps({"kind": "query", "version": VERSION, "encoder": asdict(self.encoder)})}
        return save({"directions": self.directions.contiguous()}, metadata)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        _write(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> BuyerQuery:
        """Read a query, from whomever it may come.

        Raises:
            ValueError: anything in the file is not as it must be.
        """
        data = _read(Path(path), "query", MAX_QUERY_BYTES)
        with _naming(path):
            return cls.from_bytes(data)

    @classmethod
    def from_bytes(cls, data: bytes) -> BuyerQuery:
        """Read the file's content; raises as `load`."""
        if len(data) > MAX_QUERY_BYTES:
            raise ValueError(f"a query must have at most {MAX_QUERY_BYTES} bytes, got {len(data)}")
        tensors, header = _tensors(data, "query")
        _fields(header, {"kind", "version", "encoder"}, "query")
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
        _write(Path(path), self.to_json().encode())

    def to_json(self) -> str:
        """Give the file's text."""
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
        data = _read(Path(path), "response", MAX_RESPONSE_BYTES)
        with _naming(path):
            return cls.from_json(data)

    @classmethod
    def from_json(cls, text: bytes | str) -> SellerResponse:
        """Read the file's text; raises as `load`."""
        if len(text) > MAX_RESPONSE_BYTES:
            raise ValueError(f"a response must have at most {MAX_RESPONSE_BYTES} bytes, got {len(text)}")
        record = _parse(text, "response")
        _fields(
            record,
            {"kind", "version", "query", "seller", "rows", "mean", "second", "energy", "variance_se", "energy_se"}
            | {"mean_noise", "second_noise", "epsilon", "delta"},
            "response",
        )
        mean = _vector(record["mean"], "mean", None)
        k = len(mean)
        if not isinstance(record["second"], list) or len(record["second"]) != k:
            raise ValueError(f"'second' must be a list of {k} rows")
        second = torch.stack([_vector(row, "second", k) for row in record["second"]])
        if not torch.equal(second, second.T):
            raise ValueError("'second' must be symmetric")
        variance_se = _vector(record["variance_se"], "variance_se", k)
        if bool((variance_se < 0).any()):
            raise ValueError("'variance_se' must not be negative")
        rows = record["rows"]
        if type(rows) is not int or not 2 <= rows <= MAX_ROWS:
            raise ValueError(f"'rows' must be a whole number from 2 to 2**53, got {_short(rows)}")
        moments = Moments(
            rows,
            mean,
            second,
            _number(record["energy"], "energy"),
            variance_se,
            *(_number(record[name], name) for name in ("energy_se", "mean_noise", "second_noise")),
        )
        epsilon, delta = (
            None if record[name] is None else _number(record[name], name) for name in ("epsilon", "delta")
        )
        _plausible(moments, epsilon, delta)
        return cls(
            _text(record["query"], "query", r"[0-9a-f]{64}"), _name(record["seller"], "seller"), moments, epsilon, delta
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
        """Give the buyer's moments along its own directions, decoys left out."""
        return _first(self.moments, self.directions)

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
        """Give a seller's moments along the buyer's directions, decoys left out; raises as `turned`."""
        return _first(self.turned(response), self.directions)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that only its owner may read."""
        from safetensors.torch import save

        m = self.moments
        header = {"kind": "key", "version": VERSION, "query": self.query, "decoys": self.decoys, "rows": m.rows}
        header |= {"dimension": self.dimension, "energy": m.energy, "energy_se": m.energy_se}
        header |= {"normalize": self.normalize}
        tensors = {"rotation": self.rotation, "mean": m.mean, "second": m.second, "variance_se": m.variance_se}
        data = save({name: x.contiguous() for name, x in tensors.items()}, {"sgc_market": json.dumps(header)})
        _write(Path(path), data, mode=0o600)

    @classmethod
    def load(cls, path: str | Path) -> BuyerKey:
        """Read a key; raises ValueError as `BuyerQuery.load` does."""
        data = _read(Path(path), "key", MAX_QUERY_BYTES)
        with _naming(path):
            return cls._from_bytes(data)

    @classmethod
    def _from_bytes(cls, data: bytes) -> BuyerKey:
        tensors, header = _tensors(data, "key")
        names = {"kind", "version", "query", "decoys", "rows", "dimension", "energy", "energy_se", "normalize"}
        _fields(header, names, "key")
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
            raise ValueError(f"a key's rows, decoys and dimension must be counts, got {_short(counts)}")
        if type(header["normalize"]) is not bool:
            raise ValueError(f"a key's 'normalize' must be true or false, got {_short(header['normalize'])}")
        energy, energy_se = (_number(header[name], name) for name in ("energy", "energy_se"))
        moments = Moments(counts["rows"], t["mean"], t["second"], energy, t["variance_se"], energy_se)
        query = _text(header["query"], "query", r"[0-9a-f]{64}")
        return cls(query, t["rotation"], counts["decoys"], moments, counts["dimension"], header["normalize"])


def _first(moments: Moments, count: int) -> Moments:
    return Moments(
        moments.rows,
        moments.mean[:count],
        moments.second[:count, :count],
        moments.energy,
        moments.variance_se[:count],
        moments.energy_se,
        moments.mean_noise,
        moments.second_noise,
    )


def make_query(
    x: Tensor,
    encoder: Encoder,
    *,
    directions: int = DIRECTIONS,
    decoys: int = DECOYS,
    seed: int | None = None,
) -> tuple[BuyerQuery, BuyerKey]:
    """Make a query and its key from the buyer's rows.

    Args:
        x: (n, D), finite.
        encoder: how they were made.
        directions: κ, the leading eigenvectors to ask along; the mean's direction comes on top.
        decoys: J, random directions orthogonal to those.
        seed: of decoys and rotation; None takes the system's randomness, as a query that is sent should.

    Raises:
        ValueError: too few rows, too many directions, rows that are not finite, constant data.
    """
    if x.ndim != 2 or x.shape[1] != encoder.dimension:
        raise ValueError(f"rows must have the encoder's dimension {encoder.dimension}, got shape {tuple(x.shape)}")
    directions, decoys = whole("directions", directions, at_least=1), whole("decoys", decoys, at_least=0)
    seed = whole("seed", seed, at_least=0, optional=True)
    n, dimension = x.shape
    if dimension > MAX_DIMENSION or directions + 1 + decoys > MAX_DIRECTIONS:
        raise ValueError(
            f"a query must have at most {MAX_DIRECTIONS} columns of dimension {MAX_DIMENSION}, got "
            f"{directions} + 1 + {decoys} of {dimension}"
        )
    if n < ROWS_PER_DIRECTION * directions:
        raise ValueError(
            f"a query of {directions} directions needs at least {ROWS_PER_DIRECTION * directions} rows, or it would "
            f"reveal single ones; got {n}"
        )
    if directions + 1 + decoys >= dimension:
        raise ValueError(
            f"directions + 1 + decoys must be below the dimension {dimension}, got {directions} + 1 + {decoys}"
        )
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        raise ValueError(f"every row must be finite, got NaN or infinity in row {int((~finite).nonzero()[0])}")
    true = _true_directions(x.double(), directions)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    random = normal(dimension, decoys, generator=generator)
    random = torch.linalg.qr(random - true @ (true.T @ random)).Q
    basis = torch.cat([true, random - true @ (true.T @ random)], 1)
    rotation = _random_rotation(basis.shape[1], generator)
    query = BuyerQuery((basis @ rotation.T).float(), encoder)
    moments = moments_along(x, query.directions).turned(rotation)
    own = moments_along(x, basis.float())  # standard errors as measured, not as carried over
    moments = Moments(n, moments.mean, moments.second, moments.energy, own.variance_se, own.energy_se)
    return query, BuyerKey(query.identifier, rotation, decoys, moments, dimension, encoder.normalize)


def _true_directions(x: Tensor, count: int) -> Tensor:
    """Give what the eigenvectors leave of the mean's direction, and the leading `count` of them: (D, count + 1)."""
    mean = x.mean(0)
    vectors, values = leading_eigenvectors(x - mean, count)
    if not values[-1] > 1e-12 * max(float(values[0]), torch.finfo(torch.float64).tiny):
        rank = int((values > 1e-12 * values[0]).sum())
        raise ValueError(f"the rows must vary along {count} directions, got {rank}: ask for fewer")
    rest = mean - vectors @ (vectors.T @ mean)
    if rest.norm() <= 1e-9 * x.norm(dim=1).max():  # a mean within the span: any direction will do
        rest = torch.zeros_like(mean)
        rest[vectors.square().sum(1).argmin()] = 1
    rest = rest - vectors @ (vectors.T @ rest)
    rest = rest - vectors @ (vectors.T @ rest)
    return torch.cat([(rest / rest.norm())[:, None], vectors], 1)


def leading_eigenvectors(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Give the `count` leading eigenvectors (D, count) and eigenvalues of the covariance of centred rows (n, D).

    The largest entry of each is positive: the same sign in every query, so that answers to two can be compared.
    """
    n, dimension = centred.shape
    if n <= 4 * dimension:
        _, s, vh = torch.linalg.svd(centred, full_matrices=False)
        value, vector = s[:count].square() / n, vh[:count].T
    else:
        value, vector = torch.linalg.eigh(centred.T @ centred / n)
        value, vector = value[-count:].flip(0), vector[:, -count:].flip(1)
    largest = vector.gather(0, vector.abs().argmax(0, keepdim=True))
    return vector * torch.where(largest < 0, -1.0, 1.0), value


def normal(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw float64 normal numbers; without a generator from the system's randomness, 52 bits each.

    A torch generator on a CPU knows 2³² states apart, whatever the seed: few enough to try them all, and so to take a
    basis apart, or the noise off an answer.

    Args:
        shape: of the tensor.
        generator: for what may be drawn again.
    """
    if generator is not None:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=torch.float64)
    bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) >> 12  # signed, 52 bits
    return torch.special.ndtri((bits.double() + 0.5) / 2**52 + 0.5).reshape(shape)


def _random_rotation(k: int, generator: torch.Generator | None) -> Tensor:
    """Draw an orthogonal (k, k) matrix from Haar measure."""
    q, r = torch.linalg.qr(normal(k, k, generator=generator))
    return q * r.diagonal().sign()


def collect(query: BuyerQuery, batches: Iterable[Tensor], encoder: Encoder) -> Moments:
    """Compute a seller's moments for a query, batch by batch, checked.

    Args:
        query: the buyer's.
        batches: tensors (m, D) of the seller's rows; m may vary.
        encoder: how they were made.

    Raises:
        ValueError: another encoder, too few rows, rows that are not finite or of another dimension, constant data.
    """
    query.encoder.check(encoder)
    stream = StreamingMoments(query.directions)
    for batch in batches:
        stream.update(batch)
    least = ROWS_PER_DIRECTION * query.directions.shape[1]
    if stream.rows < least:
        raise ValueError(
            f"a query of {query.directions.shape[1]} directions needs a seller of at least {least} rows, or the answer "
            f"would reveal single ones; got {stream.rows}"
        )
    moments = stream.moments()
    if not float(moments.variance.sum()) > 1e-12 * moments.energy:
        raise ValueError("the rows must vary along the query's directions, got constant ones")
    return moments


def answer(query: BuyerQuery, batches: Iterable[Tensor], encoder: Encoder, seller: str) -> SellerResponse:
    """Answer a query without noise; `privacy.private_answer` adds it. Arguments and errors as in `collect`."""
    return SellerResponse(query.identifier, _name(seller, "seller"), collect(query, batches, encoder))


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
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


def _read(path: Path, kind: str, limit: int) -> bytes:
    if not path.is_file():  # a pipe or a device would never end
        raise ValueError(f"the {kind} '{path}' is no file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"a {kind} must have at most {limit} bytes, got {path.stat().st_size}: '{path}'")
    return data


def _tensors(data: bytes, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the {kind} is no safetensors file: {_short(error)}") from None
    end = 8 + int.from_bytes(data[:8], "little")
    metadata = _parse(data[8:end], kind).get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("sgc_market"), str):
        raise ValueError(f"this is no {kind}: it lacks the 'sgc_market' entry")
    return tensors, _parse(metadata["sgc_market"], kind)


def _parse(text: bytes | str, kind: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        record = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {kind} is no JSON as it must be: {_short(error)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"the {kind} must be a JSON object, got {type(record).__name__}")
    return record


def _fields(record: dict[str, Any], names: set[str], kind: str) -> None:
    if record.get("kind") != kind:
        raise ValueError(f"this must be a {kind}, got {_short(record.get('kind'))}")
    if type(record.get("version")) is not int or record["version"] != VERSION:
        raise ValueError(f"a {kind} must have version {VERSION}, got {_short(record.get('version'))}")
    if set(record) != names:
        odd = sorted(set(record) ^ names)[0]
        raise ValueError(f"a {kind} must have exactly the fields it has, but {_short(odd)} is missing or too many")


def _number(value: Any, name: str) -> float:
    if (
        type(value) not in (int, float) or not 0 <= value <= 1e150
    ):  # NaN fails the comparison; squares must not overflow
        raise ValueError(f"'{name}' must be a finite number, not negative, got {_short(value)}")
    return float(value)


def _vector(value: Any, name: str, length: int | None) -> Tensor:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_DIRECTIONS or length not in (None, len(value)):
        raise ValueError(f"'{name}' must be a list of {length or f'1 to {MAX_DIRECTIONS}'} numbers")
    if not all(type(x) in (int, float) and abs(x) <= 1e150 for x in value):
        raise ValueError(f"'{name}' must hold finite numbers alone")
    return torch.tensor([float(x) for x in value], dtype=torch.float64)


def _text(value: Any, name: str, pattern: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"'{name}' must match {pattern}, got {_short(value)}")
    return value


def _name(value: Any, name: str) -> str:
    """Check a name for people: short, and nothing in it that a terminal would obey."""
    if not isinstance(value, str) or not 1 <= len(value) <= 64 or not value.isprintable():
        raise ValueError(f"'{name}' must be 1 to 64 printable characters, got {_short(value)}")
    return value


def _plausible(moments: Moments, epsilon: float | None, delta: float | None) -> None:
    """Refuse numbers with which scores can't be computed, and noise that nothing accounts for."""
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


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Say which file a sentence is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}: '{path}'") from None


def _encoder(record: Any) -> Encoder:
    if not isinstance(record, dict) or set(record) != {field.name for field in fields(Encoder)}:
        raise ValueError("'encoder' must have name, digest, pooling, normalize and dimension, and nothing else")
    dimension = record["dimension"]
    if type(dimension) is not int or not 1 <= dimension <= MAX_DIMENSION:
        raise ValueError(f"'dimension' must be a whole number from 1 to {MAX_DIMENSION}, got {_short(dimension)}")
    if type(record["normalize"]) is not bool:
        raise ValueError(f"'normalize' must be true or false, got {_short(record['normalize'])}")
    return Encoder(
        _name(record["name"], "name"),
        _text(record["digest"], "digest", r"[0-9a-f]{64}"),
        _name(record["pooling"], "pooling"),
        record["normalize"],
        dimension,
    )


def _short(value: Any) -> str:
    """Show what a stranger sent: short, and escaped."""
    text = ascii(value if isinstance(value, (str, int, float, bool, type(None))) else str(value))
    return text if len(text) <= 60 else f"{text[:57]}…"
