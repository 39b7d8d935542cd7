"""The papers' figures: which runs they are made of, and how they are drawn. `federated_mnist.py --sweep` runs them.

Every run is a cell with a row of its own in sweep.jsonl; a cell that has a row is not run again, so a sweep that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from federated.files import check_folder, rows_of
from federated_runs import Stopped

SEEDS = (0, 1, 2)
LAST = 5  # evaluations whose mean is a run's accuracy
Cell = dict[str, Any]

# ------------------------------------------------------------------------------------------ the runs


def selection_cells() -> list[Cell]:
    """(a) The number of participating devices, at three SNRs, on both splits; flat fading, 2,000 symbols a round."""
    common = {"scheme": "downlink-selection", "subchannels": 1, "ofdm_symbols": 2000, "rounds": 40, "steps": 3}
    return [
        {**common, "split": split, "snr_db": snr, "participants": participants, "seed": seed}
        for seed in SEEDS
        for split in ("biased", "iid")
        for snr in (0.0, 10.0, 20.0)
        for participants in (1, 2, 5, 10, 20, 40)
    ]


def antenna_cells() -> list[Cell]:
    """(b) Antennas of the blind uplink, with and without CSI error, and the error-free link."""
    common = {"split": "biased", "snr_db": 10.0, "subchannels": 64, "rounds": 40, "steps": 3}
    return [
        cell
        for seed in SEEDS
        for cell in (
            {"scheme": "ideal", **common, "seed": seed},
            *(
                {"scheme": "blind", "antennas": antennas, "csi_error": error, **common, "seed": seed}
                for antennas in (1, 2, 5, 20, 80)
                for error in (0.0, 40.0)
            ),
        )
    ]


# F and T with the same number of symbols: every device's fading is flat, or differs between 64 subchannels.
FLAT, SELECTIVE = {"subchannels": 1, "ofdm_symbols": 3925}, {"subchannels": 64, "ofdm_symbols": 62}


def noisy_cells() -> list[Cell]:
    """(c) Analog against digital downlink, at full and at lower power of the server, over the local steps."""
    common = {"scheme": "noisy-downlink", "snr_db": 0.0, "rounds": 40}
    cells = []
    for seed in SEEDS:
        for split in ("biased", "iid"):
            for fading in (FLAT, SELECTIVE):
                for downlink, power in (("analog", 1.0), ("analog", 0.25), ("digital", 1.0), ("digital", 0.25)):
                    kind = {"split": split, "downlink": downlink, "power_down": power}
                    cells.append({**common, **fading, **kind, "steps": 3, "seed": seed})
            for downlink in ("ideal", "analog", "digital"):
                for steps in (1, 3, 10):
                    kind = {"split": split, "downlink": downlink, "power_down": 1.0}
                    cells.append({**common, **FLAT, **kind, "steps": steps, "seed": seed})
    unique = {json.dumps(cell, sort_keys=True): cell for cell in cells}
    return list(unique.values())


def step_cells() -> list[Cell]:
    """(c) Many more local steps: with all devices taking part, and with five of them, drawn anew in every round."""
    common = {"scheme": "noisy-downlink", "rounds": 40, **FLAT, "power_down": 1.0}
    cells = []
    for seed in SEEDS:
        for split in ("biased", "iid"):
            for steps in (1, 3, 10, 30, 100):
                own = {**common, "split": split, "steps": steps, "seed": seed}
                if steps <= 30:
                    cells += [{**own, "downlink": downlink, "snr_db": 0.0} for downlink in ("ideal", "analog")]
                few = {**own, "participants": 5, "snr_up_db": 0.0}  # the uplink stays, the downlink gets better
                cells += [{**few, "downlink": "analog", "snr_db": snr} for snr in (0.0, 10.0)]
                cells.append({**few, "downlink": "ideal", "snr_db": 0.0})
    return cells


SWEEPS = {"selection": selection_cells, "antennas": antenna_cells, "noisy": noisy_cells, "steps": step_cells}


def key_of(cell: Cell) -> str:
    """Return a cell's key."""
    return json.dumps(cell, sort_keys=True)


def play(cell: Cell, args: argparse.Namespace, data: Any, simulation: Callable[..., Any]) -> dict[str, Any]:
    """Run one cell; its accuracy is the mean of its last five evaluations."""
    own = copy.copy(args)
    vars(own).update(cell)
    own.evaluate_every = 2
    sim = simulation(own, data, None)
    rows = list(sim.run(own.rounds, progress=False))
    curve = [(row["round"], round(row["accuracy"], 4)) for row in rows if "accuracy" in row]

    def median(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        return statistics.median(values) if values else None

    return {
        "accuracy": round(statistics.fmean(accuracy for _, accuracy in curve[-LAST:]), 4),
        "curve": curve,
        **{name: median(name) for name in ("nmse_down", "nmse_up", "bits_down", "power_up")},
        "channel_uses_down": max(row["channel_uses_down"] for row in rows),
        "channel_uses_up": max(row["channel_uses_up"] for row in rows),
        "skipped": sum(bool(row["skipped"]) for row in rows),
        "ended": sim.ended,
        "run_seconds": round(sum(row["seconds"] for row in rows), 2),
    }


def sweep(args: argparse.Namespace, open_data: Callable[..., Any], simulation: Callable[..., Any]) -> int:
    """Run the cells that have no row yet, and draw the figures."""
    out = Path(args.output_dir)
    check_folder(out, "--output_dir")
    path = out / "sweep.jsonl"
    rows = rows_of(path, {"dataset": str, "cell": dict, "accuracy": float}) if path.exists() else []
    done = {(row["dataset"], key_of(row["cell"])): row for row in rows}
    data = open_data(args)
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():  # without a line that was cut off
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in SWEEPS if args.sweep == "all" else [args.sweep]:
        for cell in tqdm(SWEEPS[name](), desc=f"cells of {name}"):
            key = (args.dataset, key_of(cell))
            if key not in done:
                try:
                    done[key] = {"dataset": args.dataset, "cell": cell, **play(cell, args, data, simulation)}
                except KeyboardInterrupt:
                    kept = f"stopped; {len(done)} cells are in '{path}', and are not run again"
                    raise Stopped(kept, signal.SIGINT) from None
                with open(path, "a") as file:
                    file.write(json.dumps(done[key]) + "\n")
        draw(name, [done[args.dataset, key_of(cell)] for cell in SWEEPS[name]()], out / f"{name}.png")
        print(out / f"{name}.png")
    return 0


# ------------------------------------------------------------------------------------------ the figures


def draw(name: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a sweep's figure: means over seeds, bars of one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = FIGURES[name]()
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, x, lines) in zip(axes, panels, strict=True):
        for color, (label, chosen) in enumerate(lines.items()):
            points = summary([row for row in rows if all(row["cell"].get(k) == v for k, v in chosen.items())], x)
            if not points:
                continue
            if set(points) == {None}:  # runs that have no x
                axis.axhline(points[None][0], color="0.4", linestyle="--", label=label)
                continue
            places = [place for place in points if place is not None]
            mean, spread = zip(*(points[place] for place in places), strict=True)
            axis.errorbar(
                places, mean, yerr=spread, marker="o", markersize=4, capsize=3, color=f"C{color}", label=label
            )
            if len(places) > 3:
                axis.set_xscale("log")
                axis.set_xticks(places, [str(place) for place in places])
        axis.set(title=title, xlabel=LABELS[x], ylabel="test accuracy")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def summary(rows: list[dict[str, Any]], x: str) -> dict[Any, tuple[float, float]]:
    """Return mean and standard deviation of the accuracy over seeds, by the value of x; None where a run has none."""
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(row["cell"].get(x), []).append(row["accuracy"])
    return {
        place: (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for place, values in sorted(groups.items(), key=lambda item: (item[0] is None, item[0] or 0))
    }


LABELS = {"participants": "participating devices J", "antennas": "antennas N_r", "steps": "local steps τ",
          "power_down": "power of the server P"}  # fmt: skip
Panel = tuple[str, str, dict[str, Cell]]


def _selection_panels() -> list[Panel]:
    def lines(split: str) -> dict[str, Cell]:
        return {f"{snr:.0f} dB": {"split": split, "snr_db": snr} for snr in (0.0, 10.0, 20.0)}

    return [(f"{split} split", "participants", lines(split)) for split in ("biased", "iid")]


def _antenna_panels() -> list[Panel]:
    lines = {f"CSI error variance {error:.0f}": {"scheme": "blind", "csi_error": error} for error in (0.0, 40.0)}
    return [("blind uplink, biased split, 10 dB", "antennas", {**lines, "error-free link": {"scheme": "ideal"}})]


def _noisy_panels() -> list[Panel]:
    panels: list[Panel] = []
    for title, fading in (("flat fading", FLAT), ("64 subchannels", SELECTIVE)):
        lines = {
            f"{downlink}, {split}": {"downlink": downlink, "split": split, "steps": 3, **fading}
            for downlink in ("analog", "digital")
            for split in ("biased", "iid")
        }
        panels.append((f"0 dB at P = 1, {title}", "power_down", lines))
    lines = {
        f"{downlink}, {split}": {"downlink": downlink, "split": split, "power_down": 1.0, **FLAT}
        for downlink in ("ideal", "analog", "digital")
        for split in ("biased", "iid")
    }
    return [*panels, ("local steps, flat fading", "steps", lines)]


def _step_panels() -> list[Panel]:
    every = {
        f"{downlink}, {split}": {"downlink": downlink, "split": split, "participants": None}
        for downlink in ("ideal", "analog")
        for split in ("biased", "iid")
    }
    panels = [("all 40 devices, 0 dB", "steps", every)]
    for split in ("biased", "iid"):
        lines = {"ideal downlink": {"downlink": "ideal", "split": split, "participants": 5}}
        for snr in (10.0, 0.0):
            analog = {"downlink": "analog", "snr_db": snr, "split": split, "participants": 5}
            lines[f"analog downlink, {snr:.0f} dB"] = analog
        panels.append((f"5 of 40 devices a round, {split} split", "steps", lines))
    return panels


FIGURES = {
    "selection": _selection_panels,
    "antennas": _antenna_panels,
    "noisy": _noisy_panels,
    "steps": _step_panels,
}
