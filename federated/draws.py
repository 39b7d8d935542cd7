"""Random numbers by name: each has its place in (seed, round, link, device), whoever draws first, in any blocks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draws:
    """A place in the tree of random numbers of a run. (ours)

    Nothing is advanced by drawing, so a run needs no generator state to be resumed, gives the same numbers for any
    number of devices batched at once, and a device on another machine draws what the simulator draws.

    Args:
        path: the seed, then names and numbers.

    Example:
        >>> round_3 = Draws((0,)).at("round", 3)
        >>> first, second = (torch.randn(1, generator=round_3.generator("noise")) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """

    path: tuple[int | str, ...]

    def at(self, *path: int | str) -> Draws:
        """Return a named place below this one."""
        return Draws((*self.path, *path))

    def seed(self, *path: int | str) -> int:
        """Return the 63-bit seed of a place: the hash (BLAKE2b) of its path."""
        name = "/".join(map(str, (*self.path, *path))).encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1

    def generator(self, *path: int | str) -> torch.Generator:
        """Return a fresh generator for a place."""
        return torch.Generator().manual_seed(self.seed(*path))
