"""A query of the buyer's rows, and a seller's answer to it. (ours)

The buyer's directions [mean direction, v₁…v_κ, decoys] are sent as one rotated orthonormal basis. So the file holds no
eigenvalue, no order and no sign; what is a decoy can't be told from what is not; and who does not know the rotation
can't make up an answer that fits. The moments along the true directions come back by turning the answer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from federated.market.fingerprint import Encoder
from federated.market.messages import BuyerKey, BuyerQuery, SellerResponse
from federated.market.moments import Moments, StreamingMoments, moments_along
from federated.market.untrusted import MAX_DIMENSION, MAX_DIRECTIONS, printable
from sgc.checks import whole

__all__ = ["BuyerKey", "BuyerQuery", "Encoder", "SellerResponse", "answer", "collect", "make_query"]

DIRECTIONS = 10  # κ, without the mean direction and the decoys
DECOYS = 8
ROWS_PER_DIRECTION = 4  # with fewer rows, moments come near to being the rows themselves


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
    """Compute what the eigenvectors leave of the mean's direction, and `count` leading ones: (D, count + 1)."""
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
    """Compute the `count` leading eigenvectors (D, count) and eigenvalues of the covariance of centred rows (n, D).

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
    """Compute a seller's moments for a query, batch by batch, and check them.

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
    return SellerResponse(query.identifier, printable(seller, "seller"), collect(query, batches, encoder))
