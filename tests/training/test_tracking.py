"""Where losses are logged, and what run.json holds of a run's cost."""

import importlib
import json
import sys

import pytest

from fastpeft import finetune
from fastpeft.training import RunRecord, TrainConfig, Trainer, tracking
from fastpeft.training.tracking import PACKAGES, trackers
from tests.training import tiny

FAST = {"use_cpu": True, "report": False, "logging_steps": 1, "learning_rate": 1e-2, "examples": 1, "max_new_tokens": 2}


def installed(monkeypatch, *names):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object() if name in names else None)


def test_tensorboard_is_the_default_where_it_is_installed(monkeypatch):
    installed(monkeypatch)
    assert trackers(None) == []
    installed(monkeypatch, "tensorboard")
    assert trackers(None) == ["tensorboard"]
    installed(monkeypatch, "tensorboardX")
    assert trackers(None) == ["tensorboard"]
    assert trackers(["none"]) == trackers([]) == []
    installed(monkeypatch, "wandb", "mlflow")
    assert trackers(["mlflow", "wandb", "mlflow"]) == ["mlflow", "wandb"]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, name):
    installed(monkeypatch)
    with pytest.raises(ValueError, match=f"{name} is not installed; pip install {PACKAGES[name][0]}"):
        trackers([name])


def test_wrong_names():
    for wrong, said in (
        (["comet"], "got \\['comet'\\]"),
        ("wandb", "a list of names"),
        (["none", "wandb"], "either 'none'"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainConfig(model="m", data="d", output_dir="o", report_to=wrong)


STAND_IN = """
from unittest.mock import MagicMock

run, config, logged, ends = None, MagicMock(), [], []

def init(**_):
    global run
    run = MagicMock()
    logged.append([])

def log(values, **_):
    logged[-1].append(values)

def finish(exit_code=None):
    global run
    run = None
    ends.append(exit_code)
"""


def test_every_run_of_a_process_has_a_run_of_its_own_at_wandb(tmp_path, monkeypatch):
    """transformers leaves W&B's open: the losses of a study's second run went to the first one's. The caller's stays open."""
    inner = tmp_path / "wandb/sdk/lib"
    inner.mkdir(parents=True)
    (tmp_path / "wandb/__init__.py").write_text(STAND_IN, encoding="utf-8")
    (inner / "config_util.py").write_text("class ConfigError(Exception): ...", encoding="utf-8")
    _forget_wandb()
    monkeypatch.syspath_prepend(tmp_path)
    tiny.bert(tmp_path / "bert", layers=1)
    data = {"train": tiny.reviews(8), "test": tiny.reviews(4, seed=1)}

    def train(number, **options):
        output = tmp_path / f"out{number}"
        finetune(tmp_path / "bert", data, "lora", output, max_steps=1, report_to=["wandb"], **FAST, **options)

    try:
        wandb = importlib.import_module("wandb")
        train(1)
        train(2)
        assert [any("loss" in key for values in run for key in values) for run in wandb.logged] == [True, True]
        assert wandb.ends == [0, 0]
        monkeypatch.setattr(Trainer, "train", lambda *_, **__: wandb.init() or int("no number"))
        with pytest.raises(ValueError, match="no number"):
            train(3)
        assert wandb.ends == [0, 0, 1]
        wandb.init()
        with pytest.raises(ValueError, match="no number"):
            train(4)
        assert wandb.ends == [0, 0, 1]
    finally:
        _forget_wandb()


def _forget_wandb():
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def test_a_run_knows_its_data_and_its_throughput(tmp_path):
    """Tokens are those of the rows: two epochs read each twice; a resumed run counts those after its checkpoint."""
    tiny.bert(tmp_path / "bert", layers=1)
    data = {"train": tiny.reviews(16), "validation": tiny.reviews(4, seed=2), "test": tiny.reviews(8, seed=1)}
    options = {"num_train_epochs": 2, "save_predictions": True, "report_to": ["none"], **FAST}
    done = finetune(tmp_path / "bert", data, "lora", tmp_path / "out", **options)
    record = RunRecord.load(tmp_path / "out/run.json")
    lengths = [len(row["text"].split()) + 2 for row in data["train"]]
    assert record.train_tokens == 2 * sum(lengths)
    assert record.tokens_per_second == pytest.approx(record.train_tokens / record.train_seconds)
    assert 0 < record.train_seconds < record.seconds
    assert record.cpu_seconds > 0
    assert record.peak_memory_mb > 0
    assert {"tokens_per_second", "cpu_seconds", "seconds", "peak_memory_mb"} <= set(done.record.summary())

    again = finetune(tmp_path / "bert", data, "lora", tmp_path / "again", **options | {"seed": 1})
    assert again.record.data_hash == record.data_hash
    data["test"][0]["text"] += " warm"
    other = finetune(tmp_path / "bert", data, "lora", tmp_path / "other", max_steps=1, **options)
    assert other.record.data_hash != record.data_hash
    resumed = finetune(
        tmp_path / "bert", data, "lora", tmp_path / "out", resume=True, **options | {"num_train_epochs": 3}
    )
    assert resumed.record.train_tokens == sum(lengths)
    assert json.loads((tmp_path / "out/run.json").read_text())["train_tokens"] == sum(lengths)
