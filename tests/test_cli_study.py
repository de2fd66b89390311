"""fastpeft study: what it prints, its exit codes, and that wrong input writes nothing."""

import pytest

from fastpeft.cli import main
from fastpeft.training.studies import execution
from tests.training import tiny
from tests.training.commands import fails, result

YAML = """
model: {model}
data: {data}
base: {{use_cpu: true, report: false, max_steps: 2, learning_rate: 1e-2, cpu_fast_matmul: false}}
methods:
  - {{method: lora, r: 2}}
  - bitfit
statistics: {{resamples: 100}}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_study")
    tiny.bert(folder / "bert", layers=1)
    tiny.write_csv(folder / "reviews.csv", tiny.reviews(40))
    text = YAML.format(model=folder / "bert", data=folder / "reviews.csv")
    (folder / "study.yaml").write_text(text, encoding="utf-8")
    return folder


def test_study_and_again(files, tmp_path, capsys):
    command = ["study", str(files / "study.yaml"), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    first = result(capsys)
    assert (first["runs"], first["trained"], first["reused"], first["failed"]) == (2, 2, 0, 0)
    assert first["best"] in ("lora", "bitfit")
    assert first["folder"] == str(tmp_path / "out")
    assert (tmp_path / "out/report.html").is_file()
    assert main(command) == 0
    again = result(capsys)
    assert (again["trained"], again["reused"]) == (0, 2)
    assert again["accuracy"] == first["accuracy"]


def test_check_prints_the_runs_and_writes_nothing(files, tmp_path, capsys):
    assert main(["study", str(files / "study.yaml"), "--output-dir", str(tmp_path / "out"), "--check"]) == 0
    printed = capsys.readouterr()
    assert "2 variants x 1 seeds = 2 runs" in printed.err
    assert "  bitfit" in printed.err
    assert not (tmp_path / "out").exists()


def test_a_failed_run_is_exit_code_1(files, tmp_path, capsys, monkeypatch):
    original = execution.run_training

    def train(config, **kwargs):
        if config.peft.peft_type == "BITFIT":
            raise ValueError("planted")
        return original(config, **kwargs)

    monkeypatch.setattr(execution, "run_training", train)
    assert main(["study", str(files / "study.yaml"), "--output-dir", str(tmp_path)]) == 1
    printed = result(capsys)
    assert (printed["trained"], printed["failed"], printed["best"]) == (1, 1, "lora")


def test_a_study_without_one_good_run(files, tmp_path, capsys, monkeypatch):
    def train(config, **kwargs):
        raise ValueError("planted")

    monkeypatch.setattr(execution, "run_training", train)
    assert main(["study", str(files / "study.yaml"), "--output-dir", str(tmp_path)]) == 1
    printed = result(capsys)
    assert (printed["trained"], printed["failed"], printed["best"]) == (0, 2, None)
    assert "planted" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_wrong_input_is_one_line(files, tmp_path, capsys):
    out = ["--output-dir", tmp_path / "out"]
    fails(capsys, ["study", tmp_path / "none.yaml", *out], "none.yaml")
    (tmp_path / "bad.yaml").write_text("model: [", encoding="utf-8")
    fails(capsys, ["study", tmp_path / "bad.yaml", *out], "expected YAML")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    fails(capsys, ["study", tmp_path / "bad.json", *out], "expected JSON")
    (tmp_path / "list.yaml").write_text("- lora\n", encoding="utf-8")
    fails(capsys, ["study", tmp_path / "list.yaml", *out], "expected a mapping")
    text = (files / "study.yaml").read_text(encoding="utf-8")
    (tmp_path / "typo.yaml").write_text(text.replace("max_steps", "max_stepps"), encoding="utf-8")
    fails(capsys, ["study", tmp_path / "typo.yaml", *out], "max_stepps -> ['max_steps'")
    fails(capsys, ["study", files / "study.yaml", "--jobs", 0, *out], "jobs of at least 1")
    assert not (tmp_path / "out").exists()
