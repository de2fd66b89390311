"""fastpeft merge: the folder is a plain model, and the printed change is what it says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fastpeft
from fastpeft.cli import main
from fastpeft.layers.base_weight import frozen_weight, is_quantized
from fastpeft.training.predict import TrainedAdapter
from fastpeft.training.run_folder import TrainingInfo
from tests.serving.tiny_server import LABELS, llama_in_whole_blocks, lora, save_adapter
from tests.tolerance import EPS32, MERGED_EQUALS_UNMERGED, METRICS_REPEATED, assert_close
from tests.training import tiny
from tests.training.commands import fails, result

IDS = torch.tensor([[5, 9, 10, 14, 20, 7]])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    llama, bert = llama_in_whole_blocks(folder / "llama"), tiny.bert(folder / "bert")
    save_adapter(folder / "plain", llama, lora(1), 1)
    save_adapter(folder / "classes", bert, lora(1, target_modules=["query", "value"]), 1, LABELS)
    save_adapter(folder / "qlora", llama, lora(1), 1)
    info = TrainingInfo.load(folder / "qlora")
    info.config = {"quantization": "nf4", "double_quant": True, "dtype": "float32", "bf16": False}
    info.save(folder / "qlora")
    return folder


def merge(files, adapter, output, capsys, *more):
    capsys.readouterr()
    command = ["merge", "--adapter", files / adapter, "--output-dir", output, *more]
    assert main([str(part) for part in command]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out.splitlines()[-1]), printed.err


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("adapter", ["plain", "classes"])
def test_a_plain_folder_with_equal_outputs(files, tmp_path, capsys, adapter):
    found, printed = merge(files, adapter, tmp_path / "merged", capsys)
    auto = AutoModelForCausalLM if adapter == "plain" else AutoModelForSequenceClassification
    plain = auto.from_pretrained(tmp_path / "merged")
    expected = logits(TrainedAdapter.load(files / adapter, use_cpu=True).model)
    assert_close("logits", logits(plain), expected, MERGED_EQUALS_UNMERGED)
    change = found["change"]
    assert change["weights"]["relative_rms"] < EPS32
    assert change["tensors"] == {"plain": 6, "classes": 10}[adapter]  # query and value have biases, the head too
    assert change["logits"]["relative_rms"] < MERGED_EQUALS_UNMERGED
    assert "weights: largest change" in printed
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w1")["input_ids"]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantised_sums_and_their_measured_change(files, tmp_path, capsys, kind):
    """The printed numbers are those that this test computes from the folder, with nothing of the command's code."""
    found, _ = merge(files, "plain", tmp_path / kind, capsys, "--quantize", kind)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    fastpeft.integrations.bitsandbytes.unpack(saved)
    exact = TrainedAdapter.load(files / "plain", use_cpu=True).model.merge_and_unload()
    errors, weights = [], []
    for path, module in saved.named_modules():
        if is_quantized(module):
            weight = exact.get_submodule(path).weight
            errors.append((frozen_weight(module).dequantize(torch.float32) - weight).flatten().double())
            weights.append(weight.flatten().double())
    assert found["change"]["tensors"] == len(errors) == 14
    error, weight = torch.cat(errors), torch.cat(weights)
    expected = [error.abs().max(), error.square().mean().sqrt(), (error.square().sum() / weight.square().sum()).sqrt()]
    got = [found["change"]["weights"][name] for name in ("largest", "rms", "relative_rms")]
    assert_close("change", torch.tensor(got).double(), torch.stack(expected).detach(), METRICS_REPEATED)
    low, high = {"nf4": (0.05, 0.15), "fp4": (0.08, 0.25), "int8": (0.002, 0.02)}[kind]
    assert low < got[2] < high
    assert found["change"]["logits"]["rms"] > 0
    assert found["quantization"] == kind
    whole, _ = merge(files, "plain", tmp_path / "whole", capsys, "--no-measure")
    assert whole["change"] is None
    assert found["bytes"] < whole["bytes"]


def test_into_what_the_quantised_base_stands_for(files, tmp_path, capsys):
    """A QLoRA adapter has learnt beside the rounded weights: merged into them its outputs stay, in the full weights they move."""
    dense, _ = merge(files, "qlora", tmp_path / "dense", capsys, "--into", "dequantized")
    full, _ = merge(files, "qlora", tmp_path / "full", capsys)
    trained = TrainedAdapter.load(files / "qlora", use_cpu=True).model
    assert any(map(is_quantized, trained.modules()))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(map(is_quantized, merged.modules()))
    assert_close("logits", logits(merged), logits(trained), MERGED_EQUALS_UNMERGED)
    assert dense["change"]["logits"]["relative_rms"] < MERGED_EQUALS_UNMERGED
    assert full["change"]["logits"]["relative_rms"] > 0.01
    assert full["change"]["weights"]["relative_rms"] < EPS32
    half, _ = merge(files, "qlora", tmp_path / "half", capsys, "--into", "dequantized", "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").lm_head.weight.dtype == torch.bfloat16
    assert EPS32 < half["change"]["weights"]["relative_rms"] < 2**-8
    again, _ = merge(files, "qlora", tmp_path / "nf4", capsys, "--quantize", "nf4", "--texts", "w1 w2", "w3")
    assert again["change"]["rows"] == 2
    assert again["change"]["weights"]["relative_rms"] > 0.05


def test_a_failure_writes_nothing(files, tmp_path, capsys, monkeypatch):
    command = ["merge", "--output-dir", tmp_path / "out", "--adapter"]
    fails(capsys, [*command, files / "plain", "--into", "dequantized"], "trained on a quantised base")
    fails(capsys, [*command, files / "nothing"], "nothing")
    monkeypatch.setattr("fastpeft.training.merge._weights", lambda *_: (_ for _ in ()).throw(OSError("planted")))
    fails(capsys, [*command, files / "plain", "--quantize", "nf4"], "planted")
    assert [path.name for path in tmp_path.iterdir()] == []
    monkeypatch.undo()
    assert main([str(part) for part in [*command, files / "plain"]]) == 0
    assert result(capsys)["merged"] == str(tmp_path / "out")
