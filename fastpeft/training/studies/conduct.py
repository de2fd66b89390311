"""A whole study: fastpeft.study."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpeft.training.studies.comparison import Comparison
    from fastpeft.training.studies.execution import Plan, Runner
    from fastpeft.training.studies.search import Variant

RESULTS_FILE, SUMMARY_FILE = "results.csv", "summary.json"


@dataclass(frozen=True)
class StudyResult:
    """What a study found, and where it is: results.csv, summary.json, report.html, best/, runs/.

    trained, reused, failed: runs of this call, runs that were finished before, runs that ended with an error
    """

    folder: Path
    summary: dict[str, Any]
    trained: int
    reused: int
    failed: int

    def to_dict(self) -> dict[str, Any]:
        """The flat object the command line prints as its last line."""
        best = self.summary.get("best") or {}
        return {
            "runs": self.trained + self.reused + self.failed,
            "trained": self.trained,
            "reused": self.reused,
            "failed": self.failed,
            "metric": self.summary["metric"],
            "best": best.get("label"),
            "best_seed": best.get("seed"),
            **{name: value for name, value in (best.get("metrics") or {}).items() if name != "tokens"},
            "folder": str(self.folder),
        }


def study(
    source: str | os.PathLike | Mapping[str, Any],
    output_dir: str | os.PathLike | None = None,
    *,
    jobs: int = 1,
    check_only: bool = False,
) -> StudyResult | None:
    """Train every variant of a study with every seed, compare them, and write results.csv, summary.json, report.html and best/.

        study({"model": "MODEL", "data": rows, "methods": ["lora", "ia3"], "grid": {"seed": [0, 1, 2]}}, "out").summary

    source:     study.yaml or .json, or a mapping of the same form; its data may be rows in memory, as finetune takes them
    output_dir: where it is kept, instead of the file's own output_dir; each run in runs/ by a digest of what decides its result
    jobs:       processes that train at once
    check_only: check everything, print the runs, and train none; returns None

    A run that is finished is never trained again, an interrupted one goes on from its last checkpoint, a failed one is recorded
    and tried again by the next call. The validation rows, where they are split off, are the same for all runs.
    Raises:  ValueError, TypeError, OSError with a one-line reason for what is wrong with the input, before anything runs
    """
    from fastpeft.training.row_metrics import LOWER_IS_BETTER
    from fastpeft.training.studies.execution import Plan, Runner
    from fastpeft.training.studies.search import corners, require_optuna, suggested, variants
    from fastpeft.training.studies.spec import read_study

    if jobs < 1:
        raise ValueError(f"study: expected jobs of at least 1, got {jobs}")
    spec = read_study(source, output_dir)
    by_optuna = spec.search.kind == "optuna"
    if by_optuna:
        require_optuna()
    plan = Plan(spec)
    planned = [] if by_optuna else variants(spec)
    plan.check(corners(spec) if by_optuna else planned)
    count = spec.search.trials if by_optuna else len(planned)
    print(f"study: {count} variants x {len(spec.seeds)} seeds = {count * len(spec.seeds)} runs in {plan.folder}")
    if check_only:
        for variant in planned:
            print(f"  {variant.label}")
        return None
    runner = Runner(plan, jobs)
    if by_optuna:
        score = _scorer(plan, runner)
        planned = suggested(spec, score, plan.metric not in LOWER_IS_BETTER)
    else:  # seed by seed, so that a study that is stopped has compared all variants
        by_variant = [plan.runs(variant) for variant in planned]
        runner.execute([runs[index] for index in range(len(spec.seeds)) for runs in by_variant])
    return _conclude(plan, runner, planned)


def _scorer(plan: "Plan", runner: "Runner"):
    """What optuna maximises: the mean over seeds of the selection's metric. NaN where a run failed."""
    from fastpeft.training.studies.comparison import RunResult

    def score(variant: "Variant") -> float:
        runs = plan.runs(variant)
        runner.execute(runs)
        scores = [RunResult.load(run).selection(plan.metric)[0] if run.finished() else math.nan for run in runs]
        return sum(scores) / len(scores)

    return score


def _conclude(plan: "Plan", runner: "Runner", planned: list["Variant"]) -> StudyResult:
    from fastpeft.training.studies.comparison import compare, keep_best, summary, write_results
    from fastpeft.training.studies.page import write_page

    runs = [run for variant in planned for run in plan.runs(variant)]
    print("comparing: intervals and paired tests")
    found: Comparison = compare(runs, plan.raw.task, plan.metric, plan.spec.statistics)
    values = {
        "title": plan.spec.title
        or f"{Path(plan.source).name}: {len(planned)} variants on {Path(plan.spec.data_name()).name}",
        "model": plan.source,
        "data": plan.spec.data_name(),
        "data_hash": plan.data_hash,
        "held_out": plan.held_out,
        "held_out_rows": len(found.best.rows["labels" if "labels" in found.best.rows else "scores"])
        if found.best
        else 0,
        **summary(found),
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_results(plan.folder / RESULTS_FILE, runs)
    draft = plan.folder / (SUMMARY_FILE + ".partial")
    draft.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, plan.folder / SUMMARY_FILE)
    if found.best is not None:
        keep_best(found.best, plan.folder)
    write_page(found, values, plan.folder)
    return StudyResult(plan.folder, values, runner.trained, runner.reused, runner.failed)
