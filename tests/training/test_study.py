"""Studies: what a file may say, that nothing is trained twice, that runs do not depend on each other, and what comes out."""

import csv
import json
import re

import numpy as np
import pytest
from datasets import Dataset

from fastpeft import PeftModel, study
from fastpeft.training import RunRecord, TrainedAdapter, Trainer
from fastpeft.training.row_metrics import row_metrics
from fastpeft.training.studies import execution
from fastpeft.training.studies.comparison import compare
from fastpeft.training.studies.curves import mean_precision_recall, mean_roc
from fastpeft.training.studies.execution import Plan
from fastpeft.training.studies.search import variants
from fastpeft.training.studies.spec import Sureness, read_study
from tests.training import tiny
from tests.training.study_cases import BASE, FEW, reviews, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("study"))


class Stopped(KeyboardInterrupt):
    pass


def stop_after(monkeypatch, steps):
    """Ctrl-C after so many training steps of all runs together."""
    taken, original = [], Trainer.training_step

    def step(self, *args, **kwargs):
        if len(taken) == steps:
            raise Stopped
        taken.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    return taken


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "runs").rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """A study of two methods and two seeds, and its folder."""
    folder = tmp_path_factory.mktemp("done")
    return study(reviews(files), folder), folder


def test_it_leaves_results_summary_report_and_the_best_adapter(files, done):
    result, folder = done
    assert (result.trained, result.reused, result.failed) == (4, 0, 0)
    with (folder / "results.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["label"], row["seed"]) for row in rows] == [
        ("lora", "0"),
        ("lora", "1"),
        ("bitfit", "0"),
        ("bitfit", "1"),
    ]
    wanted = {"accuracy", "f1", "f1_macro", "precision", "recall", "roc_auc", "trainable_parameters", "peak_memory_mb"}
    wanted |= {"seconds", "cpu_seconds", "tokens_per_second", "adapter_bytes", "error"}
    assert wanted <= set(rows[0])
    for row in rows:
        record = RunRecord.load(folder / "runs" / row["run"] / "run.json")
        assert float(row["accuracy"]) == record.metrics["accuracy"]
        assert record.training["seed"] == int(row["seed"])
        assert record.data_hash == result.summary["data_hash"]
        assert record.tokens_per_second > 0
        assert not (folder / "runs" / row["run"] / "checkpoints").exists()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary == result.summary
    assert summary["held_out"] == "test"
    assert [len(variant["seeds"]) for variant in summary["variants"]] == [2, 2]
    for variant in summary["variants"]:
        mine = [float(row["accuracy"]) for row in rows if row["label"] == variant["label"]]
        found = variant["metrics"]["accuracy"]
        assert found["mean"] == pytest.approx(np.mean(mine))
        assert found["low"] <= found["mean"] <= found["high"]
    (pair,) = summary["pairs"]
    assert set(pair["p"]) == {"mcnemar", "f1", "f1_macro", "roc_auc", "loss"}
    assert all(0 < p <= 1 for p in pair["p"].values())

    best = summary["best"]
    assert best["chosen_on"] == "validation"
    kept = TrainedAdapter.load(folder / "best", use_cpu=True)
    assert isinstance(kept.model, PeftModel)
    assert kept.evaluate(Dataset.from_list(tiny.reviews(30, 2)))[0]["accuracy"] == pytest.approx(
        best["metrics"]["accuracy"]
    )
    assert RunRecord.load(folder / "best" / "run.json").metrics == best["metrics"]
    assert {path.name for path in folder.iterdir()} == {"best", "report.html", "results.csv", "runs", "summary.json"}


def test_the_page_is_whole_and_holds_what_was_found(done):
    page = (done[1] / "report.html").read_text(encoding="utf-8")
    for text in (
        "Comparison",
        "Pairs",
        "ROC",
        "Precision and recall",
        "Training loss",
        "Peak memory",
        "Confusion matrices",
        'class="chance"',
    ):
        assert text in page, text
    assert page.count("<svg") >= 10
    assert not re.search(r"\bnan\b", page.split("<main>")[1].lower())
    for outside in ("http://", "https://", "<script", "@import", "url("):
        assert outside not in page


def test_a_study_that_is_there_trains_nothing(files, done, monkeypatch, capsys):
    result, folder = done
    before = tree(folder)
    taken = stop_after(monkeypatch, 0)
    again = study(reviews(files), folder)
    assert (again.trained, again.reused) == (0, 4)
    assert taken == []
    assert tree(folder) == before
    assert again.summary == result.summary
    assert capsys.readouterr().out.count("finished before") == 4


def test_an_interrupted_study_goes_on_and_repeats_nothing(files, done, tmp_path, monkeypatch):
    """Stopped in the fourth step of the second run: the first is kept, the second goes on after its checkpoint of step 2."""
    result, _ = done
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            study(reviews(files), tmp_path)
    finished = [path.parent for path in (tmp_path / "runs").glob("*/run.json")]
    assert len(finished) == 1
    before = {path: time for path, time in tree(tmp_path).items() if finished[0] in path.parents}
    taken = stop_after(monkeypatch, 1000)
    again = study(reviews(files), tmp_path)
    assert (again.trained, again.reused) == (3, 1)
    assert len(taken) == 2 + 4 + 4
    assert {path: time for path, time in tree(tmp_path).items() if finished[0] in path.parents} == before
    shown = [{"label": v["label"], "metrics": v["metrics"]} for v in again.summary["variants"]]
    assert shown == [{"label": v["label"], "metrics": v["metrics"]} for v in result.summary["variants"]]


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit"])
def test_a_run_does_not_depend_on_the_one_before_it(files, tmp_path, method):
    """The base model is shared: what a run puts into it must be gone. Its head is drawn by the seed."""
    alone = reviews(files, methods=[method], grid={"seed": [3]})
    after = reviews(files, methods=["bitfit", {"method": "lora", "bias": "all"}, method], grid={"seed": [3]})
    execution._BASES.clear()
    first = study(alone, tmp_path / "alone").summary["variants"]
    found = study(after, tmp_path / "after").summary["variants"]
    assert first[0]["metrics"] == next(v["metrics"] for v in found if v["label"] == first[0]["label"])


def test_the_base_is_loaded_once_a_seed(files, tmp_path, monkeypatch):
    loads = []
    original = execution.load_base
    monkeypatch.setattr(execution, "load_base", lambda *args, **kwargs: loads.append(args) or original(*args, **kwargs))
    execution._BASES.clear()
    study(reviews(files, base=BASE | {"max_steps": 1}), tmp_path)
    assert len(loads) == 2


def test_a_run_that_fails_is_recorded_and_the_study_goes_on(files, tmp_path, monkeypatch, capsys):
    original = execution.run_training

    def train(config, **kwargs):
        if config.seed == 1 and config.peft.peft_type == "LORA":
            raise RuntimeError("out of\nmemory")
        return original(config, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(execution, "run_training", train)
        found = study(reviews(files), tmp_path)
    assert (found.trained, found.failed) == (3, 1)
    assert found.summary["failed"][0]["name"] == "lora, seed 1"
    assert found.summary["failed"][0]["error"] == "RuntimeError: out of memory"
    assert "lora, seed 1: failed: RuntimeError: out of memory" in capsys.readouterr().err
    assert "RuntimeError: out of memory" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "RuntimeError: out of memory" in (tmp_path / "results.csv").read_text(encoding="utf-8")
    assert found.summary["pairs"][0]["seeds"] == [0]  # the seeds that both have
    again = study(reviews(files), tmp_path)
    assert (again.trained, again.reused, again.failed) == (1, 3, 0)
    assert again.summary["failed"] == []


@pytest.mark.slow
def test_processes_find_what_one_process_finds(files, done, tmp_path):
    found = study(reviews(files), tmp_path, jobs=2)
    assert (found.trained, found.failed) == (4, 0)
    by_label = {v["label"]: v["metrics"]["accuracy"]["mean"] for v in found.summary["variants"]}
    assert by_label == {v["label"]: v["metrics"]["accuracy"]["mean"] for v in done[0].summary["variants"]}


def test_causal_models_and_rows_in_memory(files, tmp_path):
    """The validation rows are split off once, so that all seeds are scored on the same."""
    values = {
        "model": str(files / "llama"),
        "data": tiny.questions(30),
        "base": BASE | {"max_steps": 2},
        "statistics": FEW,
    }
    found = study(values | {"grid": {"method": ["lora", "ia3"], "seed": [0, 1]}}, tmp_path)
    metrics = found.summary["variants"][0]["metrics"]
    assert set(metrics) == {"loss", "perplexity", "token_accuracy", "exact_match"}
    assert found.summary["held_out_rows"] == 3
    assert set(found.summary["pairs"][0]["p"]) == {"mcnemar", "loss", "token_accuracy"}
    assert found.summary["best"]["chosen_on"] == "validation"
    assert "Perplexity" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_decides_a_result_is_in_the_digest(files, tmp_path):
    def digests(**more):
        plan = Plan(read_study(reviews(files, **more), tmp_path))
        return [run.digest for variant in variants(plan.spec) for run in plan.runs(variant)]

    first = digests()
    assert len(set(first)) == 4
    assert digests() == first
    assert digests(title="another", base=BASE | {"report": True}) == first
    assert digests(grid={"seed": [1, 2]})[0] == first[1]
    assert not set(digests(base=BASE | {"weight_decay": 0.1})) & set(first)
    (tmp_path / "more").mkdir()
    for split in ("train", "validation", "test"):
        tiny.write_jsonl(tmp_path / f"more/{split}.jsonl", tiny.reviews(30, 7))
    assert not set(digests(data=str(tmp_path / "more"))) & set(first)


# ---- what is computed of the runs ------------------------------------------------------------------------------------


def test_the_comparison_is_of_the_predictions_that_were_kept(files, done):
    result, folder = done
    plan = Plan(read_study(reviews(files), folder))
    runs = [run for variant in variants(plan.spec) for run in plan.runs(variant)]
    found = compare(runs, plan.raw.task, "f1", Sureness(resamples=200))
    for variant in found.variants:
        for one in variant.runs:
            measured = {name: float(m(np.ones((1, 30)))[0]) for name, m in row_metrics(one.rows).items()}
            assert measured == pytest.approx({name: one.record.metrics[name] for name in measured})
    assert found.test == "f1"
    assert result.summary["metric"] == "accuracy"
    with np.load(runs[0].folder / "predictions.npz") as arrays:
        changed = dict(arrays) | {"labels": 1 - arrays["labels"]}
    kept = (runs[0].folder / "predictions.npz").read_bytes()
    np.savez(runs[0].folder / "predictions.npz", **changed)
    with pytest.raises(ValueError, match="one set of held-out rows"):
        compare(runs, plan.raw.task, "f1", Sureness(resamples=200))
    (runs[0].folder / "predictions.npz").write_bytes(kept)


def test_mean_curves_of_seeds():
    labels = np.array([0, 0, 1, 1])
    perfect = {"logits": np.array([[2.0, 0], [2, 0], [0, 2], [0, 2]]), "labels": labels}
    turned = {"logits": perfect["logits"][:, ::-1], "labels": labels}
    assert mean_roc([perfect, turned]).area == 0.5
    assert dict(mean_roc([perfect, turned]).points)[0.5] == 0.5  # of 1 and 0
    assert mean_precision_recall([perfect]).area == 1.0
    assert {height for _, height in mean_precision_recall([perfect]).points} == {1.0}
    assert mean_precision_recall([turned]).points[-1] == (1.0, 0.5)
    three = {"logits": np.eye(3), "labels": np.arange(3)}
    assert mean_roc([three]) is mean_precision_recall([three]) is None
