"""Data of `federated_mnist.py`: embedded digits, idx files, or any set of pictures or texts that `datasets` reads."""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

import data_files
from federated import partition
from federated.files import opening
from federated.simulate import tensors_of

MOST_TOKENS = 128  # of a text
HELD_OUT = 0.2  # of data without a test split


@dataclass
class Data:
    """Training and test rows: columns the model takes, "labels" among them."""

    train: Dataset
    test: Dataset
    columns: list[str]
    classes: int
    image: tuple[int, int] | None = None  # channels, side
    pictures: tuple[Tensor, Tensor] | None = None  # of the training and the test rows

    def columns_of(self, *, test: bool) -> dict[str, Tensor]:
        """Read the rows into tensors."""
        held = {} if self.pictures is None else {"pixel_values": self.pictures[test]}
        rows = self.test if test else self.train
        return held | tensors_of(rows, [name for name in self.columns if name not in held])


def open_data(args: argparse.Namespace) -> Data:
    """Open the embedded digits, a folder of idx files, or a data set of the hub.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    if args.dataset == "digits":
        return embedded_digits()
    folder = Path(args.dataset)
    with opening("the data set", args.dataset):
        idx = folder.is_dir() and list(folder.glob("*idx3-ubyte*"))
    if idx:
        return idx_folder(folder)
    return hub_data("ylecun/mnist" if args.dataset == "mnist" else args.dataset, args)


def embedded_digits() -> Data:
    """Open scikit-learn's 8×8 digits: 1,437 to train on, every fifth of 1,797 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.arange(len(digits.target)) % 5 == 0
    return images(*((digits.images[of, None] / 16, digits.target[of]) for of in (~test, test)))


def idx_folder(folder: Path) -> Data:
    """Open MNIST's own files, plain or gzipped."""

    def read(name: str, dimensions: int) -> np.ndarray:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                with opening("the idx file", path):
                    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
                    if len(sizes) != dimensions or min(sizes) < 1:
                        raise ValueError(f"it must hold {dimensions} dimensions, got {sizes}")
                    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)
        raise ValueError(f"the folder '{folder}' must hold {name} or {name}.gz, it does not")

    parts = []
    for which in ("train", "t10k"):
        pictures, labels = read(f"{which}-images-idx3-ubyte", 3), read(f"{which}-labels-idx1-ubyte", 1)
        if len(pictures) != len(labels):
            raise ValueError(f"'{folder}' must hold one label a picture, {which} has {len(pictures)} and {len(labels)}")
        parts.append((pictures[:, None] / np.float32(255), labels))
    return images(*parts)


def images(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Data:
    """Make rows of pictures (N, channels, side, side) in [0, 1] and labels."""
    sets = [Dataset.from_dict({"labels": labels.astype(np.int64)}) for _, labels in (train, test)]
    pictures = [torch.from_numpy(np.ascontiguousarray(each, dtype=np.float32)) for each, _ in (train, test)]
    channels, height, width = train[0].shape[1:]
    if height != width:
        raise ValueError(f"pictures must be square, got {height}×{width}")
    classes = int(max(train[1].max(), test[1].max())) + 1
    return Data(*sets, ["pixel_values", "labels"], classes, (channels, height), (pictures[0], pictures[1]))


def hub_data(name: str, args: argparse.Namespace) -> Data:
    """Open a data set of the hub, or a file or folder that `datasets` reads: pictures or texts with labels.

    Raises:
        ValueError: it can't be opened, or holds neither.
    """
    from datasets import Image, load_dataset, load_from_disk

    with opening("the data set", name):
        if Path(name).is_file() or (data_files.ending(Path(name)) in data_files.READERS and not Path(name).is_dir()):
            sets = data_files.read(name)
        elif any(Path(name, file).exists() for file in ("dataset_dict.json", "state.json")):
            sets = load_from_disk(name)
        else:
            sets = load_dataset(name, args.dataset_config)
    if isinstance(sets, Dataset):
        sets = {"train": sets}
    if set(sets) == {"train"} and len(sets["train"]) > 1:
        sets = sets["train"].train_test_split(test_size=HELD_OUT, seed=0)
        tqdm.write(f"note: '{name}' has no test split, {len(sets['test']):,} of its rows are held out")
    splits = [s for s in ("test", "validation") if s in sets]
    if "train" not in sets or not splits:
        raise ValueError(f"the data set '{name}' must have a train and a test split, it has {', '.join(sets)}")
    train = sets["train"]
    label = next((c for c in (args.label_column, "labels", "label", "fine_label") if c in train.column_names), None)
    if label is None:
        columns = ", ".join(train.column_names)
        raise ValueError(f"labels are missing: '{name}' has the columns {columns}; name one with --label_column")
    test = next((sets[s] for s in splits if labelled(sets[s], label)), sets[splits[0]])
    labels = numbered([partition.labels_of(rows, label) for rows in (train, test)])
    picture = next((c for c, feature in train.features.items() if isinstance(feature, Image)), None)
    if picture is not None:
        arrays = [stacked(rows[picture], name) for rows in (train, test)]
        made = images((arrays[0], labels[0]), (arrays[1], labels[1]))
    elif args.model_name_or_path is None:
        raise ValueError(f"'{name}' holds no pictures; for texts name a model with --model_name_or_path")
    else:
        made = texts(train, test, labels, args)
    if args.split in train.column_names and args.split not in made.train.column_names:  # who holds what
        made.train = made.train.add_column(args.split, train.with_format(None)[args.split][:])
    return made


def labelled(rows: Dataset, label: str) -> bool:
    """Return whether every row has its label; the hub withholds those of some test splits."""
    try:
        return len(partition.labels_of(rows, label)) > 0
    except ValueError:
        return False


def numbered(labels: list[np.ndarray]) -> list[np.ndarray]:
    """Number the labels of training and test rows where they are names."""
    if labels[0].dtype.kind in "iub":
        return [each.astype(np.int64) for each in labels]
    if labels[0].dtype.kind not in "UO":
        raise ValueError(f"labels must be classes, got {labels[0].dtype}")
    names = np.unique(np.concatenate(labels))
    return [np.searchsorted(names, each) for each in labels]


def stacked(pictures: Iterable[Any], name: str) -> np.ndarray:
    """Stack pictures of one size and kind into (N, channels, height, width) in [0, 1]."""
    arrays = []
    for picture in pictures:
        mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
        arrays.append(np.atleast_3d(np.asarray(picture.convert(mode), np.float32)) / 255)
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"pictures must be of one size, '{name}' has {arrays[0].shape} and {arrays[-1].shape}")
    return np.stack(arrays).transpose(0, 3, 1, 2)


def texts(train: Dataset, test: Dataset, labels: list[np.ndarray], args: argparse.Namespace) -> Data:
    """Tokenize rows of text."""
    from transformers import AutoTokenizer

    with opening("the model", args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    text = next((c for c in ("text", "sentence", "question") if c in train.column_names), None)
    if text is None:
        raise ValueError(f"texts need a column text, sentence or question, got {', '.join(train.column_names)}")
    sets = []
    for rows, answers in zip((train, test), labels, strict=True):
        encoded = tokenizer(rows[text][:], padding="max_length", truncation=True, max_length=MOST_TOKENS)
        columns = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        sets.append(Dataset.from_dict({**columns, "labels": answers}))
    return Data(*sets, ["input_ids", "attention_mask", "labels"], int(max(each.max() for each in labels)) + 1)
