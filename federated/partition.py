"""Who holds what: the rows of a data set, dealt out to M devices.

Every function takes a `datasets.Dataset` and returns M arrays of row numbers, sorted, none of them empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from federated.arguments import positive
from sgc.checks import whole

if TYPE_CHECKING:
    from datasets import Dataset

Rows = NDArray[np.int64]


def iid(dataset: Dataset, num_devices: int, *, seed: int = 0) -> list[Rows]:
    """Deal the rows out at random, equally many to each device up to one.

    Args:
        dataset: N rows.
        num_devices: M, at most N.
        seed: of the shuffle.

    Raises:
        ValueError: a device would be empty.
    """
    _check(num_devices, len(dataset), seed)
    order = np.random.default_rng(seed).permutation(len(dataset))
    return _checked(np.array_split(order, num_devices))


def biased(dataset: Dataset, num_devices: int, *, label: str = "labels", seed: int = 0) -> list[Rows]:
    """Deal rows of exactly two classes to every device.

    Every class is cut into groups, and every device gets groups of two different classes, any two. The number of
    groups of a class follows its size (largest remainders), at most M.

    Args:
        dataset: N rows.
        num_devices: M, at least half the number of classes.
        label: column of the classes.
        seed: of the shuffle, and of who gets what.

    Raises:
        ValueError: labels are missing, there are fewer than two classes, or too few devices or rows for them.
    """
    labels = labels_of(dataset, label)
    _check(num_devices, len(labels), seed)
    classes, sizes = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a biased split needs at least two classes, column {label!r} has {len(classes)}")
    if 2 * num_devices < len(classes):
        raise ValueError(f"two classes a device need at least {-(-len(classes) // 2)} devices, got {num_devices}")
    rng = np.random.default_rng(seed)
    groups = []
    for kind, count in zip(classes, _apportion(sizes, 2 * num_devices, most=num_devices), strict=True):
        groups += [(kind, rows) for rows in np.array_split(rng.permutation(np.flatnonzero(labels == kind)), count)]
    for _ in range(40 * num_devices):  # groups i and i + M are a device's; runs of a class are at most M long
        i, j = rng.integers(2 * num_devices, size=2)
        if groups[i][0] != groups[j - num_devices][0] and groups[j][0] != groups[i - num_devices][0]:
            groups[i], groups[j] = groups[j], groups[i]
    pairs = [np.concatenate([groups[i][1], groups[i + num_devices][1]]) for i in range(num_devices)]
    return _checked([pairs[i] for i in rng.permutation(num_devices)])


def dirichlet(
    dataset: Dataset, num_devices: int, alpha: float, *, label: str = "labels", seed: int = 0, tries: int = 100
) -> list[Rows]:
    """Deal every class out in shares drawn from Dirichlet(α) over the devices (Hsu et al., arXiv 1909.06335).

    Args:
        dataset: N rows.
        num_devices: M.
        alpha: α; the smaller, the more the devices differ.
        label: column of the classes.
        seed: of the shares.
        tries: draws before giving up on one in which no device is empty.

    Raises:
        ValueError: labels are missing, α is not positive, or a device stayed empty in every try.
    """
    alpha, tries = positive("alpha", alpha), whole("tries", tries, at_least=1)
    labels = labels_of(dataset, label)
    _check(num_devices, len(labels), seed)
    rng = np.random.default_rng(seed)
    parts: list[Rows] = []
    for _ in range(tries):
        dealt: list[list[Rows]] = [[] for _ in range(num_devices)]
        for kind in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == kind))
            ends = np.floor(np.cumsum(rng.dirichlet(np.full(num_devices, alpha))) * len(rows)).astype(np.int64)[:-1]
            for device, share in enumerate(np.split(rows, ends)):
                dealt[device].append(share)
        parts = [np.concatenate(shares) for shares in dealt]
        if all(len(part) for part in parts):
            return _checked(parts)
    empty = sum(not len(part) for part in parts)
    raise ValueError(
        f"no device may be empty: with alpha={alpha}, {empty} of {num_devices} were in the last of {tries} tries; "
        "take a larger alpha or fewer devices"
    )


def by_column(dataset: Dataset, column: str) -> list[Rows]:
    """Make a device of every value of a column (a speaker, a site), in sorted order.

    Raises:
        ValueError: there is no such column, or a value is missing.
    """
    values = labels_of(dataset, column)
    return _checked([np.flatnonzero(values == value) for value in np.unique(values)])


def labels_of(dataset: Dataset, column: str) -> NDArray[Any]:
    """Read a column of labels.

    Raises:
        ValueError: there is no such column, or a row has no label.
    """
    if column not in dataset.column_names:
        raise ValueError(f"the data have no column {column!r}, only {', '.join(dataset.column_names)}")
    values = dataset.with_format(None)[column][:]
    missing = sum(value is None for value in values)
    if missing:
        raise ValueError(f"every row needs a label, column {column!r} has {missing} without")
    labels = np.asarray(values)
    if labels.dtype.kind in "iu" and (labels < 0).any():  # -1 marks a missing label on the hub
        raise ValueError(f"every row needs a label, column {column!r} has {int((labels < 0).sum())} below 0")
    return labels


def plot_partition(parts: Sequence[Rows], labels: NDArray[Any], path: str | Path, *, title: str = "") -> None:
    """Draw who holds what: a dot for every device and class, its area the number of rows.

    Args:
        parts: M arrays of rows.
        labels: (N,).
        path: of the picture.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = np.unique(labels)
    counts = np.array([[np.count_nonzero(labels[part] == kind) for part in parts] for kind in classes])
    figure = Figure(figsize=(max(4.0, 0.22 * len(parts) + 1.5), 0.28 * len(classes) + 1.4), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    kind, device = np.nonzero(counts)
    axes.scatter(device, kind, s=120 * counts[kind, device] / counts.max(), color="#0b6e4f")
    axes.set(xlabel="device", ylabel="class", title=title, yticks=range(len(classes)), yticklabels=map(str, classes))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _apportion(sizes: NDArray[np.int64], total: int, most: int) -> Rows:
    """Divide `total` groups by size: at least one and at most `most` for each, by largest remainders."""
    wanted = sizes / sizes.sum() * total
    groups = np.clip(np.floor(wanted).astype(np.int64), 1, most)
    while groups.sum() != total:
        more = 1 if groups.sum() < total else -1
        room = groups < most if more > 0 else groups > 1
        groups[np.argmax(np.where(room, more * (wanted - groups), -np.inf))] += more
    if (groups > sizes).any():
        kind = int(np.argmax(groups - sizes))
        raise ValueError(f"class {kind} has {sizes[kind]} rows for {groups[kind]} groups; take fewer devices")
    return groups


def _check(num_devices: int, rows: int, seed: int) -> None:
    whole("num_devices", num_devices, at_least=1)
    whole("seed", seed, at_least=0)
    if num_devices > rows:
        raise ValueError(f"no device may be empty: {rows} rows do not reach for {num_devices} devices")


def _checked(parts: Sequence[NDArray[Any]]) -> list[Rows]:
    return [np.sort(part).astype(np.int64) for part in parts]
