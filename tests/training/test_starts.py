"""train with adapters that begin from the weights or from the data: saved, loaded, and resumed to the same bits."""

import json

import pytest
from safetensors.torch import load_file

from fastpeft import LoraConfig
from fastpeft.cli import main
from tests.tolerance import assert_bits_equal
from tests.training import tiny

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    tiny.llama(folder / "model")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.questions(60))
    return folder


def run(files, output, *more):
    options = {"model": files / "model", "data": files / "rows.jsonl", "output-dir": output, "r": 2, "examples": 0}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    fixed = ["--target-modules", "q_proj", "v_proj", "--no-baseline", "--no-report", "--use-cpu", "--max-steps", "4"]
    steps = ["--eval-strategy", "steps", "--eval-steps", "2", "--loraplus-lr-ratio", "4"]
    return main(["train", *flags, *fixed, *steps, *more])


@pytest.mark.parametrize("kind", ["pissa", "eva"])
def test_a_run_is_resumed_to_the_same_bits(files, tmp_path, kind, capsys):
    """The start is found again from the same weights and rows; what was trained comes from the checkpoint."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    for output in (whole, halved):
        assert run(files, output, "--init-lora-weights", kind) == 0
    (halved / TENSORS).unlink()
    for late in halved.glob("checkpoints/checkpoint-4/*"):
        late.unlink()
    assert run(files, halved, "--init-lora-weights", kind, "--resume") == 0, capsys.readouterr().err
    tensors, others = load_file(whole / TENSORS), load_file(halved / TENSORS)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert_bits_equal(name, others[name], tensor)
    config = LoraConfig.from_dict(json.loads((whole / "adapter_config.json").read_text()))
    assert config.init_lora_weights == kind
    if kind == "eva":
        ranks = [tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name]
        assert len(set(ranks)) > 1, "the rank was not redistributed"
