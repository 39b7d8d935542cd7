"""One compression for the optimizer, the wire and the radio: chunk, sparsify, project, recover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgc.checks import sequence, shown, whole, word
from sgc.codec.encode import encode, select
from sgc.codec.layout import Layout, make_layout
from sgc.codec.project import Projection, check_projection
from sgc.codec.recover import METHODS, recover

__all__ = ["Codec"]


class Codec:
    """Compress tensors to k numbers per chunk, and back.

    Encoding keeps the s largest entries of each chunk of n and projects them through a hashed sign matrix A, so the
    sketch of a sum of sparse tensors is the sum of their sketches. A depends on `seed` alone: every process and machine
    makes the same.

    Args:
        chunk_size: n, wanted entries of a chunk; None makes the whole tensor one chunk.
        sketch_size: k, numbers kept per chunk; at k ≥ n the sparse chunk is kept as it is.
        sparsity: s, entries kept of each chunk before projection.
        seed: of A.

    Raises:
        ValueError: a size below 1, or a negative seed.
        TypeError: one that is not a whole number.

    Example:
        >>> codec = Codec(chunk_size=256, sketch_size=64, sparsity=4)
        >>> x = torch.zeros(2, 256).index_put((torch.tensor([0, 1]), torch.tensor([5, 9])), torch.tensor([1.0, -2.0]))
        >>> sketch = codec.encode(x)
        >>> sketch.shape, torch.allclose(codec.decode(sketch, x.shape), x, atol=1e-4)
        (torch.Size([2, 64]), True)
    """

    def __init__(
        self, chunk_size: int | None = 1024, sketch_size: int = 128, sparsity: int = 16, seed: int = 0
    ) -> None:
        self.chunk_size = whole("chunk_size", chunk_size, at_least=1, optional=True)
        self.sketch_size = whole("sketch_size", sketch_size, at_least=1)
        self.sparsity = whole("sparsity", sparsity, at_least=1)
        self.seed = whole("seed", seed, at_least=0)
        self._projection = Projection(self.sketch_size, self.seed)

    def __repr__(self) -> str:
        return (
            f"Codec(chunk_size={self.chunk_size}, sketch_size={self.sketch_size}, "
            f"sparsity={self.sparsity}, seed={self.seed})"
        )

    def encode(self, x: Tensor) -> Tensor:
        """Sparsify and project a tensor of any shape.

        Args:
            x: real floating point, finite.

        Returns:
            The sketch (c, min(k, n)) in fp32.

        Raises:
            TypeError: x is not a dense real floating-point tensor.
        """
        _check_dense("x", x)
        layout = make_layout(x.shape, self.chunk_size)
        check_projection(layout.chunk, self.sketch_size)
        return encode(layout.grid(x), layout, self._projection, self.sparsity)[0]

    def encode_rows(self, x: Tensor, *, sparsity: int | None = None) -> tuple[Tensor, Tensor]:
        """Sparsify and project vectors, each as `encode` would, and return what that leaves out of them.

        Error feedback adds the rest of a vector to the next one.

        Args:
            x: (B, d) real floating point, finite.
            sparsity: entries to keep of each chunk; default s.

        Returns:
            The sketches (B, c, min(k, n)) in fp32, and the vectors (B, d) with what was kept of them set to zero.

        Raises:
            TypeError: x is not a dense real floating-point tensor.
            ValueError: a sparsity below 1.
        """
        _check_dense("x", x)
        sparsity = self.sparsity if sparsity is None else whole("sparsity", sparsity, at_least=1)
        one = make_layout(x.shape[1:], self.chunk_size)
        rest = torch.nn.functional.pad(x, (0, one.chunks * one.chunk - one.numel))
        rows = Layout((rest.numel(),), len(x) * one.chunks, one.chunk, one.chunk)
        check_projection(one.chunk, self.sketch_size)
        index, value = select(rows.grid(rest), rows, None, min(sparsity, one.chunk))
        sketch = self._projection.project(index, value, one.chunk)
        rest = rest.view(-1, one.chunk).scatter(1, index, 0.0).view(rest.shape)
        return sketch.view(len(x), one.chunks, -1), rest[:, : one.numel]

    def decode(
        self, sketch: Tensor, shape: Sequence[int], *, sparsity: int | None = None, method: str = "omp"
    ) -> Tensor:
        """Recover the sparse tensor that explains a sketch.

        Args:
            sketch: (c, min(k, n)), of one tensor or the sum of several tensors' sketches.
            shape: of the tensor.
            sparsity: s', entries to recover in each chunk; default s.
            method: "omp", "gomp" or "threshold".

        Returns:
            A tensor of `shape` in fp32 with at most s' entries in each chunk.

        Raises:
            ValueError: the sketch does not belong to this shape, an unknown method, or s' above k.
            TypeError: the sketch is not a dense real floating-point tensor; an argument of another kind.
        """
        _check_dense("sketch", sketch)
        shape = tuple(whole("shape", size, at_least=0) for size in sequence("shape", shape, "a sequence of sizes"))
        layout = make_layout(shape, self.chunk_size)
        sparsity = self.sparsity if sparsity is None else whole("sparsity", sparsity)
        expected = (layout.chunks, min(self.sketch_size, layout.chunk))
        if tuple(sketch.shape) != expected:
            raise ValueError(
                f"a tensor of shape {tuple(shape)} has a sketch of shape {expected}, got {tuple(sketch.shape)}"
            )
        method = word("method", method, METHODS)
        if not 1 <= sparsity or (self.sketch_size < layout.chunk and sparsity > self.sketch_size):
            raise ValueError(f"sparsity must be in [1, sketch_size={self.sketch_size}], got {sparsity}")
        check_projection(layout.chunk, self.sketch_size)
        index, value = recover(sketch.float(), layout, self._projection, sparsity, method)
        return layout.scatter(index, value).view(shape)


def _check_dense(name: str, tensor: Any) -> None:
    """Raise TypeError where what is given as `name` is not a dense real floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a dense real floating-point tensor, got {shown(tensor)}")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense real floating-point tensor, got {tensor.dtype} in {tensor.layout}")
