import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from federated import partition


def dataset(labels, **columns):
    return Dataset.from_dict({"labels": list(labels), **columns})


LABELS = np.random.default_rng(0).integers(0, 10, 2000)
DATA = dataset(LABELS)


def dealt_out_once(parts, rows):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows)) and all(len(part) for part in parts)


@pytest.mark.parametrize("devices", [1, 7, 40, 2000])
def test_an_iid_split_deals_every_row_out_once_and_evenly(devices):
    parts = partition.iid(DATA, devices)
    assert len(parts) == devices
    assert dealt_out_once(parts, 2000)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(5, 60), st.integers(0, 50))
def test_every_device_of_a_biased_split_has_two_classes(devices, seed):
    parts = partition.biased(DATA, devices, seed=seed)
    assert len(parts) == devices
    assert dealt_out_once(parts, 2000)
    assert {len(np.unique(LABELS[part])) for part in parts} == {2}


def test_biased_devices_mix_many_pairs_of_classes():
    parts = partition.biased(DATA, 100)
    pairs = {tuple(np.unique(LABELS[part])) for part in parts}
    assert len(pairs) > 30  # of 45
    assert len({(one < 5, other < 5) for one, other in pairs}) == 3


def test_a_biased_split_of_unequal_classes_still_gives_two_to_each():
    labels = np.repeat([0, 1, 2], [900, 80, 20])
    parts = partition.biased(dataset(labels), 10)
    assert dealt_out_once(parts, 1000)
    assert {len(np.unique(labels[part])) for part in parts} == {2}


@pytest.mark.parametrize("alpha", [0.3, 1.0, 100.0])
def test_a_dirichlet_split_deals_every_row_out_once(alpha):
    assert dealt_out_once(partition.dirichlet(DATA, 10, alpha), 2000)


def test_the_larger_alpha_the_more_alike_devices_are():
    def spread(alpha):
        counts = [np.bincount(LABELS[part], minlength=10) for part in partition.dirichlet(DATA, 10, alpha)]
        return np.std([count / count.sum() for count in counts], axis=0).mean()

    assert spread(0.3) > 2 * spread(3.0) > 4 * spread(100.0)


def test_a_column_gives_each_of_its_values_a_device():
    speakers = ["eve", "bob", "eve", "ann", "bob"]
    parts = partition.by_column(dataset([0] * 5, speaker=speakers), "speaker")
    assert [part.tolist() for part in parts] == [[3], [1, 4], [0, 2]]


@pytest.mark.parametrize(
    "split", [partition.iid, partition.biased, lambda d, m, seed: partition.dirichlet(d, m, 1.0, seed=seed)]
)
def test_a_split_is_decided_by_its_seed(split):
    first, again, other = (split(DATA, 8, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        (lambda: partition.iid(DATA, 2001), "no device may be empty: 2000 rows do not reach for 2001 devices"),
        (lambda: partition.iid(DATA, 0), "num_devices must be at least 1, got 0"),
        (lambda: partition.biased(DATA, 4), "need at least 5 devices, got 4"),
        (lambda: partition.biased(dataset([1] * 9), 4), "at least two classes, column 'labels' has 1"),
        (lambda: partition.biased(dataset([0, 1] * 2), 4, label="digit"), "no column 'digit', only labels"),
        (lambda: partition.biased(dataset([0, 1, None, 1]), 2), "column 'labels' has 1 without"),
        (lambda: partition.biased(dataset([0, 1, -1, -1]), 2), "column 'labels' has 2 below 0"),
        (lambda: partition.biased(dataset([0] * 40 + [1]), 20), "class 1 has 1 rows for 20 groups"),
        (lambda: partition.dirichlet(DATA, 10, 0.0), "alpha must be positive and finite, got 0.0"),
        (lambda: partition.dirichlet(DATA, 1500, 0.01, tries=2), "no device may be empty: with alpha=0.01"),
        (lambda: partition.by_column(DATA, "site"), "no column 'site'"),
    ],
)
def test_a_split_that_cannot_be_is_refused(split, sentence):
    with pytest.raises(ValueError, match=sentence):
        split()


def test_the_picture_of_who_holds_what_is_drawn(tmp_path):
    partition.plot_partition(partition.biased(DATA, 12), LABELS, tmp_path / "who.png", title="biased")
    assert (tmp_path / "who.png").stat().st_size > 5000
