"""Tables of the quality benchmark, drawn from its rows as Markdown."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.suites import SUITES, Setting, Suite

BLOCK = re.compile(r"(<!-- (table|rates|gains): ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
VALIDATION, TEST = "validation", "test"  # what a learning rate is chosen on
OLD = "‡"  # marks what was chosen on the data that are reported, as all was before there was a validation split


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval by Student's t; nan with fewer than two values."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}" if math.isfinite(self.half) else f"{self.mean:+.3f}"


def interval(values: list[float]) -> Interval:
    """Estimate the mean of values that were drawn independently."""
    from scipy.stats import t

    if len(values) < 2:
        return Interval(statistics.fmean(values), math.nan)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), half)


def setting_of(row: Row) -> Setting:
    """Return the setting of a row; older rows have no length."""
    return Setting(row["task"], row["steps"], row["batch_size"], row["train_rows"], row.get("length", 0))


def chosen_on(row: Row) -> str:
    """Return the split that a row's learning rate is chosen on; older rows have no validation split."""
    return row.get("chosen_on", TEST)


def score(row: Row) -> float:
    """Return what a learning rate is chosen by."""
    metric, loss = ("metric", "eval_loss") if chosen_on(row) == TEST else ("validation_metric", "validation_loss")
    return row[metric] if math.isfinite(row[loss]) else -math.inf


def inside(rate: float, rates: Sequence[float]) -> bool:
    """Return whether the grid goes on at both sides of a rate."""
    return min(rates) < rate < max(rates)


def grid(found: list[Row], setting: Setting, optimizer: str, suite: Suite) -> dict[float, Row]:
    """Return the runs on the first seed by rate, all of them chosen on the same split.

    Those with a validation split, unless older ones are further.
    """
    rates = suite.rates_of(setting.task, optimizer)
    grids: dict[str, dict[float, Row]] = {VALIDATION: {}, TEST: {}}
    for row in found:
        if setting_of(row) == setting and (row["optimizer"], row["seed"]) == (optimizer, suite.seeds[0]):
            grids[chosen_on(row)][row["lr"]] = row
    here = {split: {lr: rows[lr] for lr in rates if lr in rows} for split, rows in grids.items()}
    return max(here.values(), key=len)  # of equals the first


def best_runs(found: list[Row], setting: Setting, optimizer: str, suite: Suite) -> list[Row]:
    """Return the finished runs of an optimizer at its best rate of those run on the first seed, one per seed."""
    first = grid(found, setting, optimizer, suite)
    if not first:
        return []
    best = max(first.values(), key=score)
    alike = ("optimizer", "lr")
    runs = [
        row
        for row in found
        if (setting_of(row), chosen_on(row)) == (setting, chosen_on(best))
        and all(row[name] == best[name] for name in alike)
        and row["seed"] in suite.seeds
    ]
    return sorted(runs, key=lambda row: row["seed"])


def comparable(found: list[Row], setting: Setting, optimizer: str, suite: Suite) -> list[Row]:
    """Return the rows that an optimizer's best runs may be held against: chosen on the same split as they are."""
    runs = best_runs(found, setting, optimizer, suite)
    return [row for row in found if runs and chosen_on(row) == chosen_on(runs[0])]


def complete(found: list[Row], setting: Setting, optimizer: str, suite: Suite) -> bool:
    """Return whether all rates have run on the first seed, and all seeds at the best one."""
    first = grid(found, setting, optimizer, suite)
    runs = best_runs(found, setting, optimizer, suite)
    return len(first) == len(suite.rates_of(setting.task, optimizer)) and len(runs) == len(suite.seeds)


def together(found: list[Row], setting: Setting, names: tuple[str, ...], suite: Suite) -> list[Row]:
    """Return the rows of one split in which all of the optimizers are complete, of the validation split if they are."""
    for split in (VALIDATION, TEST):
        rows = [row for row in found if chosen_on(row) == split]
        if all(complete(rows, setting, name, suite) for name in names):
            return rows
    return []


def on_front(points: dict[str, tuple[float, float]]) -> set[str]:
    """Return the names of the points (bytes, score) that no other beats in score with no more bytes."""
    return {
        name
        for name, (size, value) in points.items()
        if not any(
            other_size <= size and other >= value and (other_size, other) != (size, value)
            for key, (other_size, other) in points.items()
            if key != name
        )
    }


def table(suite: Suite, found: list[Row]) -> str:
    """Draw a suite: per setting mean ± standard deviation over the seeds at the best rate, and against AdamW.

    The difference to AdamW is paired by seed, with a 95 % interval (Student's t). ★: on the Pareto front of the
    setting, no other optimizer is as good with no more bytes. †: some runs are missing. ‡: the rate was chosen on the
    test split. With a frozen body in the suite and several settings, also the mean over the settings and its gain as a
    share of AdamW's.
    """
    gains = "frozen" in suite.optimizers and len(suite.settings) > 1
    head = ["optimizer", "state ÷ AdamW's"]
    for setting in suite.settings:
        head += [title(setting), "− AdamW, paired"]
    head += ["mean", "of AdamW's gain"] if gains else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    fronts = {setting: on_front(points(found, setting, suite)) for setting in suite.settings}
    for optimizer in suite.optimizers:
        parts, ratios = [], []
        for setting in suite.settings:
            runs = best_runs(found, setting, optimizer, suite)
            parts += _parts(found, setting, optimizer, suite, optimizer in fronts[setting])
            ratios += [runs[0]["state_ratio"]] if runs else []
        if gains:
            parts += _gain(found, optimizer, suite)
        ratio = f"{statistics.fmean(ratios):.4f}" if ratios else ""
        lines.append(f"| `{optimizer}` | {ratio} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def points(found: list[Row], setting: Setting, suite: Suite) -> dict[str, tuple[float, float]]:
    """Return (bytes of state, mean score) of every optimizer that has run."""
    runs = {name: best_runs(found, setting, name, suite) for name in suite.optimizers}
    return {
        name: (max(row["state_bytes"] for row in mine), statistics.fmean(row["metric"] for row in mine))
        for name, mine in runs.items()
        if mine
    }


def title(setting: Setting) -> str:
    """Name a setting for people."""
    rows, tokens = (
        f", {setting.train_rows} rows" * bool(setting.train_rows),
        f" × {setting.length}" * bool(setting.length),
    )
    return f"{setting.task}, {setting.steps} × {setting.batch_size}{tokens}{rows}"


def paired(one: list[Row], other: list[Row]) -> Interval | None:
    """Estimate by how much `one` is better than `other`, from the seeds that both have run."""
    scores = [{row["seed"]: row["metric"] for row in runs} for runs in (one, other)]
    seeds = scores[0].keys() & scores[1].keys()
    return interval([scores[0][seed] - scores[1][seed] for seed in sorted(seeds)]) if seeds else None


def _parts(found: list[Row], setting: Setting, optimizer: str, suite: Suite, front: bool) -> list[str]:
    runs = best_runs(found, setting, optimizer, suite)
    if not runs:
        return ["missing", ""]
    scores = [run["metric"] for run in runs]
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    mark = "" if complete(found, setting, optimizer, suite) else " †"
    mark += f" {OLD}" * (chosen_on(runs[0]) == TEST)
    mean = f"{statistics.fmean(scores):.3f}{spread} ({runs[0]['lr']:g}){' ★' * front}{mark}"
    adamw = best_runs(comparable(found, setting, optimizer, suite), setting, "adamw", suite)
    against = paired(runs, adamw) if optimizer != "adamw" else None
    return [mean, "" if against is None else str(against)]


def _gain(found: list[Row], optimizer: str, suite: Suite) -> list[str]:
    alone = _mean_over_settings(found, optimizer, (optimizer,), suite)
    if alone is None:
        return ["missing", "missing"]
    three = (optimizer, "frozen", "adamw")
    mean, frozen, adamw = (_mean_over_settings(found, name, three, suite) for name in three)
    gained = mean is not None and frozen is not None and adamw is not None
    return [f"{alone:.3f}", f"{(mean - frozen) / (adamw - frozen):.0%}" if gained else ""]


def _mean_over_settings(found: list[Row], name: str, beside: tuple[str, ...], suite: Suite) -> float | None:
    """Return the mean of `name` on rows that all of `beside` have; None: somebody's runs are missing."""
    rows = {setting: together(found, setting, beside, suite) for setting in suite.settings}
    if not all(rows.values()):
        return None
    runs = [best_runs(rows[setting], setting, name, suite) for setting in suite.settings]
    return statistics.fmean(statistics.fmean(run["metric"] for run in seeds) for seeds in runs)


def rate_table(suite: Suite, found: list[Row]) -> str:
    """Return a table of what the first seed's learning rate is chosen by, with the best rate and where it lies.

    That is the score on the validation split, or on the test split where ‡ says so.
    """
    lines: list[str] = []
    for setting in suite.settings:
        lines += ["", f"| {title(setting)}, seed {suite.seeds[0]} | learning rate: score | |", "|---" * 3 + "|"]
        for optimizer in suite.optimizers:
            rates = suite.rates_of(setting.task, optimizer)
            first = grid(found, setting, optimizer, suite)
            run = {lr: score(row) for lr, row in first.items()}
            text = ", ".join(f"{lr:g}: {run[lr]:.3f}" if lr in run else f"{lr:g}: missing" for lr in rates)
            whole = len(rates) > 1 and len(run) == len(rates)
            at_end = whole and not inside(max(run, key=run.__getitem__), rates)
            old = any(chosen_on(row) == TEST for row in first.values())
            lines.append(f"| `{optimizer}` | {text} | {' '.join([OLD] * old + ['best at an end'] * at_end)} |")
    return "\n".join(lines).strip()


DRAWN = {"table": table, "rates": rate_table}


def gain_table(chosen: list[Suite], found: list[Row]) -> str:
    """Draw by how much each optimizer beats the frozen body, as a share of AdamW's gain, task by task, and in the mean.

    Only optimizers of which no run is missing in any of the suites are drawn, and each must be in all of them.
    """
    settings = [(suite, suite.settings[0]) for suite in chosen]
    head = ["optimizer", *(title(at) for _, at in settings), "mean"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rows = {}
    for name in chosen[0].optimizers:
        three = (name, "frozen", "adamw")
        held = [together(found, at, three, suite) for suite, at in settings]
        if not all(held):
            continue
        shares = []
        for (suite, at), here in zip(settings, held, strict=True):
            runs = [best_runs(here, at, each, suite) for each in three]
            mean, frozen, adamw = (statistics.fmean(run["metric"] for run in each) for each in runs)
            shares.append((mean - frozen) / (adamw - frozen))
        rows[name] = [*shares, statistics.fmean(shares)]
    for name, shares in sorted(rows.items(), key=lambda item: -item[1][-1]):
        lines.append(f"| `{name}` | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(lines)


def fill(text: str, found: list[Row]) -> str:
    """Put the tables of today's rows where a page asks for them.

    Args:
        text: with blocks `<!-- table: SUITE -->` … `<!-- end -->`, what is between is replaced; also `rates: SUITE` and
            `gains: SUITE SUITE`.
        found: rows.

    Raises:
        ValueError: a block names no suite, or there is none.
    """

    def block(match: re.Match[str]) -> str:
        begin, kind, names, end = match.groups()
        if unknown := [name for name in names.split() if name not in SUITES]:
            raise ValueError(f"a table must be of one of {', '.join(SUITES)}, got {unknown[0]!r}")
        chosen = [SUITES[name] for name in names.split()]
        drawn = gain_table(chosen, found) if kind == "gains" else DRAWN[kind](chosen[0], found)
        return f"{begin}{drawn}\n{end}"

    filled, count = BLOCK.subn(block, text)
    if not count:
        raise ValueError("the page has no block <!-- table: SUITE --> … <!-- end -->")
    return filled
