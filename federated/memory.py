"""What is remembered for all devices between rounds: tensors by name, in files where they are large."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from federated.downlink import Memory
from federated.server import check_state


class Memories:
    """Tensors (rows, d) by name, memory-mapped where they are large.

    Args:
        folder: whose folder `memory` gets the files; None: a temporary one, which goes with this object.
        limit: bytes of a tensor above which it lies in a file.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.held: dict[str, Tensor] = {}
        self.files: dict[str, Path] = {}

    def zeros(self, name: str, rows: int, size: int) -> Memory:
        """Make zeros (rows, size), and hold them; None where there are no rows."""
        if not rows:
            return None
        if 4 * rows * size <= self.limit:
            self.held[name] = torch.zeros(rows, size)
            return self.held[name]
        if self.folder is None:
            folder = Path(tempfile.mkdtemp(prefix="federated-"))
            weakref.finalize(self, shutil.rmtree, folder)
        else:
            folder = self.folder / "memory"
            folder.mkdir(parents=True, exist_ok=True)
        path = self.files[name] = folder / f"{name}.bin"
        with open(path, "wb") as file:
            file.truncate(4 * rows * size)
        self.held[name] = _map(path, torch.Size((rows, size)), write=True)
        return self.held[name]

    def save(self, folder: Path) -> dict[str, Tensor]:
        """Copy the files into a folder, and return the tensors that lie in none."""
        for name, path in self.files.items():
            shutil.copyfile(path, folder / f"{name}.bin")
        return {name: memory for name, memory in self.held.items() if name not in self.files}

    def read(self, folder: Path, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Find what `save` left in a folder and returned.

        Raises:
            ValueError: it is not what is held here, in names, sizes or types, or not finite.
        """
        found = dict(saved)
        for name, memory in self.held.items():
            path, size = folder / f"{name}.bin", 4 * memory.numel()
            if path.is_file():
                if path.stat().st_size != size:
                    raise ValueError(f"{path.name} must have {size} bytes, got {path.stat().st_size}")
                found[name] = _map(path, memory.shape, write=False)
        check_state(found, {name: memory.shape for name, memory in self.held.items()})
        return found

    def restore(self, found: Mapping[str, Tensor]) -> None:
        """Copy what `read` returned into the tensors that are held."""
        for name, memory in self.held.items():
            memory.copy_(found[name])


def _map(path: Path, shape: torch.Size, *, write: bool) -> Tensor:
    return torch.from_file(str(path), shared=write, size=shape.numel(), dtype=torch.float32).view(shape)
