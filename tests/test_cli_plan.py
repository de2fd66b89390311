"""fastpeft plan on the command line."""

import json

import pytest

from fastpeft.cli import main
from tests.tiny_models import llama


@pytest.fixture
def folder(tmp_path):
    llama().config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(capsys, *options):
    code = main(["plan", *options])
    shown = capsys.readouterr()
    return code, json.loads(shown.out.splitlines()[-1]) if code == 0 else None, shown


def test_a_folder_with_a_config_is_enough(capsys, folder):
    options = (
        "--method",
        "qlora",
        "--r",
        "4",
        "--seq-len",
        "32",
        "--batch-size",
        "2",
        "--target-modules",
        "all-linear",
    )
    code, result, shown = run(capsys, "--model", str(folder), *options, "--gpu", "rtx-4090")
    assert code == 0
    assert (result["quantization"], result["batch_size"], result["seq_len"]) == ("nf4", 2, 32)
    assert sum(result["parts"].values()) == result["peak_bytes"]
    assert result["needed_bytes"] == result["peak_bytes"] + 2**30
    assert result["fits"]["24"]["margin_bytes"] == 24 * 2**30 - result["needed_bytes"]
    assert result["largest"]["batch_size"] > 2
    for word in ("quantisation statistics", "allowance", "RTX-4090".lower(), "largest batch at 32 tokens"):
        assert word in shown.out


def test_the_config_file_itself_and_json_alone(capsys, folder):
    options = ("--model", str(folder / "config.json"), "--seq-len", "16", "--json")
    code, result, shown = run(capsys, *options)
    assert code == 0
    assert len(shown.out.splitlines()) == 1
    assert result["method"] == "LORA"
    assert result["largest"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "llama-3-8bb"), "did you mean llama-3-8bb -> ['llama-3-8b'"),
        (("--model", "llama-3-8b", "--method", "lorra"), "did you mean"),
        (("--model", "llama-3-8b", "--gpu", "h1000"), "did you mean h1000 -> ['h100'"),
        (("--model", "llama-3-8b", "--batch-size", "0"), "batch_size: expected at least 1, got 0"),
        (("--model", "./nowhere"), "'./nowhere'"),
    ],
)
def test_bad_options_end_with_one_line(capsys, options, said):
    code, _, shown = run(capsys, *options)
    assert code == 2
    assert said in shown.err
    assert shown.err.count("error:") == 1
    assert shown.out == ""
