"""What a study found: every variant's metrics with intervals, and which pairs differ by more than chance."""

import csv
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft.training.record import CLASSIFICATION, RunRecord, plain_json
from fastpeft.training.row_metrics import LOWER_IS_BETTER, joined, row_metrics, row_outcomes
from fastpeft.training.run_folder import CHECKPOINTS, PREDICTIONS_FILE, RECORD_FILE
from fastpeft.training.statistics import Interval, bootstrap_interval, holm, mcnemar, paired_permutation, pooled
from fastpeft.training.studies.execution import ERROR_FILE, LOG_FILE, PLAN_FILE, PlannedRun
from fastpeft.training.studies.spec import Sureness

BEST = "best"
_PERMUTED = {CLASSIFICATION: ("f1", "f1_macro", "roc_auc", "loss"), "causal_lm": ("loss", "token_accuracy")}
_TEST_OF = {"accuracy": "mcnemar", "exact_match": "mcnemar", "perplexity": "loss"}
_COSTS = (
    "trainable_parameters", "total_parameters", "peak_memory_mb", "seconds", "cpu_seconds", "train_seconds",
    "tokens_per_second", "adapter_bytes",
)  # fmt: skip


@dataclass
class RunResult:
    """A finished run: its record, and what it says of every held-out row."""

    run: PlannedRun
    record: RunRecord
    rows: dict[str, np.ndarray]

    @classmethod
    def load(cls, run: PlannedRun) -> "RunResult":
        with np.load(run.folder / PREDICTIONS_FILE) as arrays:
            return cls(run, RunRecord.load(run.folder / RECORD_FILE), dict(arrays))

    def selection(self, metric: str) -> tuple[float, str]:
        """What chooses the best adapter, and on which rows: the validation rows' best where the test rows are apart from them,
        else the held-out rows, whose metric is then too good by the choice."""
        seen = [entry[f"eval_{metric}"] for entry in self.record.history if entry.get(f"eval_{metric}") is not None]
        if self.record.training.get("held_out") == "test" and seen:
            best = min(seen) if metric in LOWER_IS_BETTER else max(seen)
            return float(best if self.record.training.get("load_best_model_at_end") else seen[-1]), "validation"
        value = self.record.metrics.get(metric)
        return (math.nan if value is None else float(value)), str(self.record.training.get("held_out"))


@dataclass
class VariantResult:
    """The runs of one variant. intervals: metric -> of the mean over seeds; spread: its standard deviation between seeds."""

    label: str
    method: str
    options: dict[str, Any]
    runs: list[RunResult]
    intervals: dict[str, Interval] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return [result.run.seed for result in self.runs]

    def cost(self, name: str) -> float:
        """The mean over seeds of one number of the records."""
        return float(np.mean([getattr(result.record, name) for result in self.runs]))


@dataclass
class Pair:
    """Two variants on the same rows and seeds. p and corrected (Holm, over all pairs) by test: "mcnemar" or a metric."""

    first: str
    second: str
    seeds: list[int]
    difference: dict[str, float] = field(default_factory=dict)
    p: dict[str, float] = field(default_factory=dict)
    corrected: dict[str, float] = field(default_factory=dict)
    discordant: tuple[int, int] = (0, 0)


@dataclass
class Comparison:
    """All of it. best is the run that was kept; chosen_on the rows that chose it."""

    task: str
    metric: str
    variants: list[VariantResult]
    pairs: list[Pair]
    failed: list[PlannedRun]
    sureness: Sureness
    best: RunResult | None = None
    chosen_on: str = ""

    @property
    def test(self) -> str:
        """The test that belongs to the study's metric."""
        return _TEST_OF.get(self.metric, self.metric)

    def pair(self, first: str, second: str) -> Pair | None:
        return next((pair for pair in self.pairs if {pair.first, pair.second} == {first, second}), None)

    def ranked(self) -> list[VariantResult]:
        """From the best to the worst by the metric of the held-out rows."""
        sign = 1 if self.metric in LOWER_IS_BETTER else -1
        return sorted(self.variants, key=lambda variant: sign * variant.intervals[self.metric].value)


def compare(runs: Sequence[PlannedRun], task: str, metric: str, sureness: Sureness) -> Comparison:
    """The statistics of all finished runs.

    Raises:  ValueError if two runs were not evaluated on the same rows
    """
    finished = [RunResult.load(run) for run in runs if run.finished()]
    _check_rows(finished)
    by_label: dict[str, VariantResult] = {}
    for result in finished:
        variant = result.run.variant
        empty = VariantResult(variant.label, variant.method, variant.options, [])
        by_label.setdefault(variant.label, empty).runs.append(result)
    variants = list(by_label.values())
    for variant in variants:
        _measure(variant, sureness)
    pairs = [_paired(first, second, task, sureness) for first, second in itertools.combinations(variants, 2)]
    pairs = [pair for pair in pairs if pair is not None]
    for test in dict.fromkeys(test for pair in pairs for test in pair.p):
        tested = [pair for pair in pairs if test in pair.p]
        for pair, corrected in zip(tested, holm([pair.p[test] for pair in tested])):
            pair.corrected[test] = corrected
    found = Comparison(task, metric, variants, pairs, [run for run in runs if not run.finished()], sureness)
    found.best, found.chosen_on = _best(finished, metric)
    return found


def _check_rows(finished: list[RunResult]) -> None:
    for result in finished[1:]:
        for name in ("labels", "scores"):
            mine, first = result.rows.get(name), finished[0].rows.get(name)
            if name == "scores" and mine is not None:
                mine, first = mine[:, 2], first[:, 2]  # tokens with a loss
            if mine is not None and not np.array_equal(mine, first):
                raise ValueError(
                    f"study: expected one set of held-out rows, but {result.run.name} and {finished[0].run.name} differ in them"
                )


def _measure(variant: VariantResult, sureness: Sureness) -> None:
    measured = [row_metrics(result.rows) for result in variant.runs]
    rows = len(next(iter(variant.runs[0].rows.values())))
    for name in measured[0]:
        variant.intervals[name] = bootstrap_interval(
            pooled([metrics[name] for metrics in measured]),
            rows,
            confidence=sureness.confidence,
            resamples=sureness.resamples,
            seed=sureness.seed,
            kind=sureness.interval,
        )
        single = [float(metrics[name](np.ones((1, rows)))[0]) for metrics in measured]
        variant.spread[name] = float(np.std(single, ddof=1)) if len(single) > 1 else math.nan


def _paired(first: VariantResult, second: VariantResult, task: str, sureness: Sureness) -> Pair | None:
    """The tests of two variants on the seeds that both have, or None without one."""
    ours = {result.run.seed: result.rows for result in first.runs}
    theirs = {result.run.seed: result.rows for result in second.runs}
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    pair = Pair(first.label, second.label, seeds)
    right = [np.stack([row_outcomes(rows[seed]) for seed in seeds], axis=1) for rows in (ours, theirs)]
    counted = mcnemar(*right)
    pair.p["mcnemar"], pair.discordant = counted.p, (counted.first_only, counted.second_only)
    pair.difference["mcnemar"] = float(right[0].mean() - right[1].mean())
    both = [row_metrics(joined(ours[seed], theirs[seed])) for seed in seeds]
    for name in _PERMUTED[task]:
        if name in both[0]:
            metric = pooled([metrics[name] for metrics in both])
            tested = paired_permutation(metric, len(right[0]), resamples=sureness.resamples, seed=sureness.seed)
            pair.p[name], pair.difference[name] = tested.p, tested.difference
    return pair


def _best(finished: list[RunResult], metric: str) -> tuple[RunResult | None, str]:
    """The run with the best selection; of equal ones that with fewer trained parameters."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    scored = [(result, *result.selection(metric)) for result in finished]
    scored = [row for row in scored if math.isfinite(row[1])]
    if not scored:
        return None, ""
    best = min(scored, key=lambda row: (sign * row[1], row[0].record.trainable_parameters))
    return best[0], best[2]


def summary(found: Comparison) -> dict[str, Any]:
    """All numbers of a comparison as plain JSON values."""
    variants = [
        {
            "label": variant.label,
            "method": variant.method,
            "options": variant.options,
            "seeds": variant.seeds,
            "metrics": {
                name: {
                    "mean": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "seed_sd": variant.spread[name],
                }
                for name, interval in variant.intervals.items()
            },
            **{name: variant.cost(name) for name in _COSTS},
        }
        for variant in found.ranked()
    ]
    values: dict[str, Any] = {
        "task": found.task,
        "metric": found.metric,
        "statistics": vars(found.sureness),
        "variants": variants,
        "pairs": [vars(pair) for pair in found.pairs],
        "failed": [{"run": run.digest, "name": run.name, "error": run.error()} for run in found.failed],
    }
    if found.best is not None:
        best = found.best
        values["best"] = {
            "run": best.run.digest,
            "label": best.run.variant.label,
            "seed": best.run.seed,
            "chosen_on": found.chosen_on,
            "chosen_by": best.selection(found.metric)[0],
            "metrics": best.record.metrics,
        }
    return plain_json(values)


def write_results(path: Path, runs: Sequence[PlannedRun]) -> None:
    """results.csv: one row a run, with its options, metrics and costs, or its error."""
    options = list(dict.fromkeys(name for run in runs for name in run.variant.options))
    rows = []
    for run in runs:
        row: dict[str, Any] = {
            "run": run.digest,
            "label": run.variant.label,
            "method": run.variant.method,
            "seed": run.seed,
        }
        row["status"] = "finished" if run.finished() else "failed"
        row |= {name: run.variant.options.get(name, "") for name in options}
        if run.finished():
            record = RunRecord.load(run.folder / RECORD_FILE)
            row |= {"learning_rate": record.training["learning_rate"]}
            row |= {name: value for name, value in record.metrics.items() if name != "tokens"}
            row |= {name: getattr(record, name) for name in _COSTS}
        row |= {"folder": str(run.folder), "error": run.error() or ""}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("folder", "error")))
    draft = path.with_name(path.name + ".partial")
    with draft.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*names, "folder", "error"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)


def keep_best(best: RunResult, folder: Path) -> Path:
    """A copy of a run's adapter as `folder`/best; one that was there goes when the copy is whole."""
    target = folder / BEST
    left = shutil.ignore_patterns(CHECKPOINTS, LOG_FILE, ERROR_FILE, PREDICTIONS_FILE, PLAN_FILE, "*.partial")
    with tempfile.TemporaryDirectory(prefix=".best-", dir=folder) as draft:
        copy = Path(draft) / "new"
        shutil.copytree(best.run.folder, copy, ignore=left)
        if target.exists():
            os.replace(target, Path(draft) / "old")
        os.replace(copy, target)
    return target
