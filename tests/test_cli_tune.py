"""fastpeft tune on the CPU: measures for real, keeps what it measured, refuses what it cannot."""

import json

import pytest

from fastpeft.cli import main
from tests.tiny_models import llama


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    from fastpeft.ops import algorithms, tune_table

    monkeypatch.setenv("FASTPEFT_TUNE_DIR", str(tmp_path / "tables"))
    tune_table._read.cache_clear()
    yield
    tune_table._read.cache_clear()
    algorithms.forget_choices()


def run(capsys, *options):
    code = main(["tune", *options])
    shown = capsys.readouterr()
    return code, json.loads(shown.out.splitlines()[-1]) if code == 0 else None, shown


def test_shapes_are_measured_once(capsys):
    options = ("--shapes", "24x16", "16x24", "--rows", "4", "8", "--r", "3", "--dtype", "float32")
    code, result, shown = run(capsys, *options)
    assert code == 0
    assert (result["problems"], result["measured"]) == (4, 4)
    assert set(result["best"].values()) <= {"function", "composed"}
    assert shown.out.count(" us") == 8
    code, again, _ = run(capsys, *options)
    assert (again["problems"], again["measured"], again["best"]) == (4, 0, result["best"])


def test_a_model_gives_the_shapes(capsys, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    code, result, _ = run(capsys, "--model", str(tmp_path / "model"), "--rows", "4", "--r", "2", "--dtype", "float32")
    assert code == 0
    shapes = {(m.out_features, m.in_features) for m in model.modules() if hasattr(m, "out_features")}
    assert result["problems"] == len(shapes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--model or --shapes, got neither"),
        (("--shapes", "16"), "'16'"),
        (("--shapes", "0x16"), "'0x16'"),
        (("--shapes", "16x16", "--rows", "0"), "--rows"),
        (("--shapes", "16x16", "--r", "0"), "--r"),
    ],
)
def test_bad_options_end_with_one_line(capsys, options, said):
    code, _, shown = run(capsys, *options)
    assert code == 2
    assert shown.err.splitlines()[-1].startswith("error: tune:")
    assert said in shown.err
