"""Buyers and sellers to try a data market with: from scikit-learn's digits, from MNIST, from text sets.

Every seller has rows of its own: none is the buyer's, and none is in two sellers, unless the seller is a copy by name.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEXT_SETS = ("SST-2", "CoLA", "MRPC", "RTE", "Wikipedia", "C4", "Shakespeare", "boolq")


@dataclass(frozen=True)
class Market:
    """A buyer's rows, sellers' rows by name, and which sellers have the buyer's kind of content."""

    buyer: list[Any]
    sellers: dict[str, list[Any]]
    right: frozenset[str]


def digits_market(buyer_rows: int, seed: int) -> Market:
    """Make a dozen sellers of scikit-learn's 1,797 handwritten digits, (8, 8) images in [0, 1].

    Args:
        buyer_rows: at most 300.
        seed: of who gets which image.

    Raises:
        ValueError: too many rows for the buyer.
    """
    from sklearn.datasets import load_digits

    if not 1 <= buyer_rows <= 300:
        raise ValueError(f"the buyer of digits must have 1 to 300 rows, got {buyer_rows}")
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8), labels[order]
    buyer, images, labels = images[:buyer_rows], images[buyer_rows:], labels[buyer_rows:]
    single = rng.integers(10)
    special = (labels == single) & (rng.random(len(labels)) < 0.7)  # the others keep a few of the class
    one_class, images = images[special], images[~special]
    small, images = images[:30], images[30:]
    parts = np.array_split(images, 9)
    shape = (len(parts[0]), 8, 8)

    def shuffled(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1)[:, rng.permutation(64)].reshape(x.shape)

    sellers = {
        "digits A": parts[0],
        "digits B": parts[1],
        "duplicated": np.concatenate([small] * 6),
        f"only {single}s": one_class,
        "slightly noisy": (parts[2] + 0.15 * rng.standard_normal(parts[2].shape)).clip(0, 1),
        "noisy": (parts[3] + 0.5 * rng.standard_normal(parts[3].shape)).clip(0, 1),
        "inverted": 1 - parts[4],
        "shifted": np.roll(parts[5], 2, axis=2),
        "scaled": parts[6] * 0.3,
        "pixels shuffled": shuffled(parts[7]),
        "mirrored": parts[8][:, :, ::-1],
        "random": rng.random(shape),
    }
    right = frozenset({"digits A", "digits B", "duplicated", "scaled"})
    return Market(list(buyer), {name: [row.astype(np.float32) for row in x] for name, x in sellers.items()}, right)


def mnist(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Read MNIST in its original format: images (n, 28, 28) of bytes, labels (n,)."""
    stem = {"train": "train", "test": "t10k"}[split]
    with gzip.open(folder / f"{stem}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), dtype=np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), dtype=np.uint8, offset=8)
    return images, labels


def mnist_market(images: np.ndarray, labels: np.ndarray, buyer_rows: int, rows: int, seed: int) -> Market:
    """Make sellers of MNIST as it is and changed, and of scikit-learn's digits.

    Args:
        images: (n, 28, 28) of bytes.
        labels: (n,).
        buyer_rows: of the buyer.
        rows: of a seller.
        seed: of who gets which image.
    """
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    images, labels = images[order], labels[order]
    taken = 0

    def take(n: int, where: np.ndarray | None = None) -> np.ndarray:
        nonlocal taken, images, labels
        index = np.arange(n) if where is None else where.nonzero()[0][:n]
        part = images[index]
        keep = np.ones(len(images), bool)
        keep[index] = False
        images, labels = images[keep], labels[keep]
        return part

    def noisy(x: np.ndarray, sigma: float) -> np.ndarray:
        return (x + 255 * sigma * rng.standard_normal(x.shape)).clip(0, 255).astype(np.uint8)

    buyer = take(buyer_rows)
    sellers = {"MNIST": take(rows), "MNIST, every row ten times": np.repeat(take(max(rows // 10, 80)), 10, axis=0)}
    sellers |= {f"noisy {sigma}": noisy(take(rows), sigma) for sigma in (0.2, 0.5)}
    sellers["inverted"] = 255 - take(rows)
    sellers["pixels shuffled"] = take(rows).reshape(rows, -1)[:, rng.permutation(784)].reshape(rows, 28, 28)
    for digit in range(10):
        sellers[f"only {digit}s"] = take(rows, labels == digit)
    small = (load_digits().images * 16).clip(0, 255).astype(np.uint8)
    large = np.kron(small, np.ones((3, 3), np.uint8))  # (24, 24), in a frame of two
    sellers["digits"] = np.pad(large, ((0, 0), (2, 2), (2, 2)))[rng.permutation(len(large))[:rows]]
    right = frozenset({"MNIST", "MNIST, every row ten times"})
    return Market(list(buyer), {name: list(x) for name, x in sellers.items()}, right)


def read_texts(folder: Path, name: str) -> list[str]:
    """Read all sentences of one of `TEXT_SETS`, in the order of the file.

    Args:
        folder: with `glue`, `text` and `commonsense`.
        name: of the set.
    """
    readers: dict[str, Callable[[], list[str]]] = {
        "SST-2": lambda: _column(folder / "glue/SST-2/train.tsv", 0),
        "CoLA": lambda: _column(folder / "glue/CoLA/train.tsv", 3, header=False),
        "MRPC": lambda: _column(folder / "glue/MRPC/train.tsv", 3),
        "RTE": lambda: _column(folder / "glue/RTE/train.tsv", 1),
        "Wikipedia": lambda: _sentences((folder / "text/wiki_demo.txt").read_text(encoding="utf-8")),
        "C4": lambda: _sentences(
            "\n".join(
                json.loads(line)["text"]
                for line in (folder / "text/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
            )
        ),
        "Shakespeare": lambda: _sentences((folder / "text/tinyshakespeare.txt").read_text(encoding="utf-8")),
        "boolq": lambda: [
            row["instruction"].split("question: ")[1].split("\n")[0]
            for row in json.loads((folder / "commonsense/boolq.train.json").read_text(encoding="utf-8"))
        ],
    }
    if name not in readers:
        raise ValueError(f"a text set must be one of {', '.join(readers)}, got {name!r}")
    return list(dict.fromkeys(readers[name]()))  # none twice, so that no row of the buyer is a seller's


def _column(path: Path, index: int, header: bool = True) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row[index] for row in rows[header:] if len(row) > index]


def _sentences(text: str) -> list[str]:
    lines = (line.strip() for line in text.replace(". ", ".\n").splitlines())
    return [line for line in lines if len(line.split()) >= 4]


def text_market(folder: Path, buyer: str, buyer_rows: int, rows: int, seed: int) -> Market:
    """Make a buyer of one text set and sellers of all.

    Args:
        folder: as in `read_texts`.
        buyer: one of `TEXT_SETS`.
        buyer_rows: of the buyer.
        rows: of a seller, at most.
        seed: of who gets which row.
    """
    shuffled = {name: read_texts(folder, name) for name in TEXT_SETS}
    for texts in shuffled.values():
        random.Random(seed).shuffle(texts)
    if buyer not in shuffled:
        raise ValueError(f"the buyer must be one of {', '.join(TEXT_SETS)}, got {buyer!r}")
    own = shuffled[buyer][:buyer_rows]
    shuffled[buyer] = shuffled[buyer][buyer_rows:]
    return Market(own, {name: texts[:rows] for name, texts in shuffled.items()}, frozenset({buyer}))
