"""The papers' claims in numbers: tables of docs/federated.md from the rows of federated_sweep.py.

python benchmarks/federated_claims.py

A difference is taken within each seed, and given as its mean over the seeds ± half of its 95 % interval (Student's t).
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "recipes"))

from scipy.stats import t as student

import federated_sweeps
from benchmarks import harness

Runs = dict[int, dict[str, Any]]  # seed → row
ROWS = {federated_sweeps.key_of(row["cell"]): row for row in harness.rows("federated_sweep")}


def runs(name: str, **wanted: Any) -> Runs:
    """Find the runs of a sweep that differ in nothing but their seed."""
    cells = [cell for cell in federated_sweeps.SWEEPS[name]() if all(cell.get(k) == v for k, v in wanted.items())]
    found = [(cell["seed"], ROWS.get(federated_sweeps.key_of(cell))) for cell in cells]
    if len({seed for seed, _ in found}) != len(found):
        raise ValueError(f"{wanted} names several runs of a seed")
    return {seed: row for seed, row in found if row is not None}


def mean(found: Runs, name: str = "accuracy") -> str:
    """Format a mean over the seeds."""
    values = [row[name] for row in found.values()]
    return f"{statistics.fmean(values):.3f}".lstrip("0") if values else "–"


def interval(differences: Iterable[float]) -> str:
    """Format a mean and half the width of its interval."""
    values = list(differences)
    if len(values) < 2:
        return "–"
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.3f} ± {half:.3f}"


def between(one: Runs, other: Runs) -> list[float]:
    """Return the differences in accuracy, seed by seed."""
    return [one[seed]["accuracy"] - other[seed]["accuracy"] for seed in sorted(one.keys() & other.keys())]


def table(head: list[str], lines: Iterable[list[str]]) -> None:
    """Print a table."""
    for line in [head, ["---"] * len(head), *lines]:
        print("| " + " | ".join(line) + " |")
    print()


def selection() -> None:
    """Print the table of claim (a): accuracy over J."""
    numbers = (1, 2, 5, 10, 20, 40)
    lines = []
    for split in ("biased", "iid"):
        for snr in (0.0, 10.0, 20.0):
            found = {j: runs("selection", split=split, snr_db=snr, participants=j) for j in numbers}
            best = max(numbers, key=lambda j: statistics.fmean([r["accuracy"] for r in found[j].values()] or [0]))
            ends = [interval(between(found[best], found[end])) if best != end else "–" for end in (1, 40)]
            lines.append([f"{split}, {snr:.0f} dB", *map(mean, found.values()), str(best), *ends])
    table(["", *(f"J = {j}" for j in numbers), "best J", "best − J = 1", "best − J = 40"], lines)
    for split in ("biased", "iid"):
        for more in (10, 20, 40):
            gains = []
            for snr in (0.0, 10.0, 20.0):
                few, many = (runs("selection", split=split, snr_db=snr, participants=j) for j in (5, more))
                gains.append(between(many, few))
            change = interval(map(_minus, gains[2], gains[0]))
            print(f"{split}, J = {more} − J = 5 at 0, 10, 20 dB:", *map(interval, gains), "; 20 dB − 0 dB:", change)
    print()


def antennas() -> None:
    """Print the table of claim (b): accuracy over N_r."""
    numbers = (1, 2, 5, 20, 80)
    ideal = runs("antennas", scheme="ideal")
    for label, csi in (("perfect CSI", 0.0), ("σ̃² = 40", 40.0)):
        found = [runs("antennas", antennas=a, csi_error=csi) for a in numbers]
        lines = [["accuracy", *map(mean, found), mean(ideal)]]
        lines.append(["minus error-free", *(interval(between(each, ideal)) for each in found), ""])
        lines.append(["NMSE up", *(mean(each, "nmse_up") for each in found), "0"])
        table([label, *map(str, numbers), "error-free"], lines)
    both = [
        (runs("antennas", antennas=a, csi_error=0.0), runs("antennas", antennas=a, csi_error=40.0)) for a in numbers
    ]
    print("cost of the CSI error:", *(interval(between(*pair)) for pair in both), sep="  ")
    print()


def noisy() -> None:
    """Print the table of claim (c): analog against digital."""
    lines = []
    for name, fading in (("flat", federated_sweeps.FLAT), ("64 subchannels", federated_sweeps.SELECTIVE)):
        gaps = {}
        for split in ("biased", "iid"):

            def at(downlink: str, power: float, split: str = split, fading: Any = fading) -> Runs:
                return runs("noisy", split=split, downlink=downlink, power_down=power, steps=3, **fading)

            kinds = [at("analog", 1.0), at("analog", 0.25), at("digital", 1.0), at("digital", 0.25)]
            gaps[split] = between(kinds[0], kinds[2])
            skipped = "/".join(str(row["skipped"]) for row in kinds[2].values())
            low = interval(between(kinds[1], kinds[2]))
            lines.append([f"{name}, {split}", *map(mean, kinds), interval(gaps[split]), low, skipped])
        lines.append([f"{name}, biased gap − IID gap", *[""] * 4, interval(map(_minus, *gaps.values())), "", ""])
    head = ["", "analog 1", "analog ¼", "digital 1", "digital ¼", "analog − digital", "analog ¼ − digital 1", "skipped"]
    table(head, lines)


def _minus(a: float, b: float) -> float:
    return a - b


def steps() -> None:
    """Print the table of claim (c): accuracy over τ."""
    numbers = (1, 3, 10, 30, 100)
    links: list[tuple[str, dict[str, Any]]] = [
        ("all, ideal", {"participants": None, "downlink": "ideal"}),
        ("all, analog 0 dB", {"participants": None, "downlink": "analog"}),
        ("5 of 40, ideal", {"participants": 5, "downlink": "ideal"}),
        ("5 of 40, analog 10 dB", {"participants": 5, "downlink": "analog", "snr_db": 10.0}),
        ("5 of 40, analog 0 dB", {"participants": 5, "downlink": "analog", "snr_db": 0.0}),
    ]

    def best(found: dict[int, Runs]) -> int:
        return max(numbers, key=lambda n: statistics.fmean([r["accuracy"] for r in found[n].values()] or [0]))

    lines = []
    gains: dict[tuple[str, str], list[float]] = {}
    for name, link in links:
        for split in ("biased", "iid"):
            found = {n: runs("steps", split=split, steps=n, **link) for n in numbers}
            gains[name, split] = between(found[30], found[10])
            changes = [interval(gains[name, split]), interval(between(found[100], found[10]))]
            lines.append([f"{name}, {split}", *map(mean, found.values()), str(best(found)), *changes])
    table(["", *(f"τ = {n}" for n in numbers), "best τ", "τ = 30 − τ = 10", "τ = 100 − τ = 10"], lines)
    for name, _ in links:
        change = interval(map(_minus, gains[name, "biased"], gains[name, "iid"]))
        print(f"{name}: what τ = 30 gains on τ = 10, biased − IID:", change)
    for worse in ("5 of 40, analog 10 dB", "5 of 40, analog 0 dB"):
        change = interval(map(_minus, gains["5 of 40, ideal", "biased"], gains[worse, "biased"]))
        print(f"the same, biased, ideal downlink − {worse}:", change)


if __name__ == "__main__":
    for part in (selection, antennas, noisy, steps):
        part()
