"""The record of a run, and its folder."""

import json
import math

import numpy as np
import pytest

from fastpeft.training import RunRecord
from fastpeft.training.data import Columns
from fastpeft.training.run_folder import TrainingInfo, check_output_folder
from fastpeft.training.text_format import TextFormat


def test_a_record_comes_back_as_plain_json(tmp_path):
    record = RunRecord("t", "classification", "m", metrics={"accuracy": np.float64(0.5), "loss": math.nan})
    record.peft_config = {"target_modules": {"v", "q"}, "rank": np.int64(4)}
    record.history = [{"step": 1, "loss": math.inf}]
    loaded = RunRecord.load(record.save(tmp_path / "new" / "run.json"))
    assert loaded.metrics == {"accuracy": 0.5, "loss": None}
    assert loaded.peft_config == {"target_modules": ["q", "v"], "rank": 4}
    assert loaded.history == [{"step": 1, "loss": None}]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]
    assert json.loads(json.dumps(loaded.summary(), allow_nan=False))["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object"),
        ('{"title": "t"}', "missing fields"),
        ('{"x": 1}', "unknown"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, text, reason):
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"run\.json: .*{reason}"):
        RunRecord.load(tmp_path / "run.json")
    with pytest.raises(ValueError, match="expected task in"):
        RunRecord("t", "vision", "m")


def test_training_info_comes_back(tmp_path):
    info = TrainingInfo(
        "causal_lm", "m", columns=Columns(text="t"), text_format=TextFormat(8, "plain", " "), config={"r": 1}
    )
    info.save(tmp_path)
    assert TrainingInfo.load(tmp_path) == info
    values = json.loads((tmp_path / "fastpeft_training.json").read_text())
    for broken in ({**values, "task": "vision"}, {name: value for name, value in values.items() if name != "model"}):
        (tmp_path / "fastpeft_training.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(ValueError, match=r"fastpeft_training\.json"):
            TrainingInfo.load(tmp_path)


def test_an_output_folder_is_checked_without_making_it(tmp_path):
    assert check_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileExistsError, match="holds a run already"):
        check_output_folder(tmp_path)
    assert check_output_folder(tmp_path, overwrite=True) == check_output_folder(tmp_path, resume=True) == tmp_path
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_output_folder(tmp_path / "adapter_config.json" / "below")
