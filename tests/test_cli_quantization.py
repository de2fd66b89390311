"""fastpeft train --quantization, and the commands that use what it trained."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import fastpeft
from fastpeft.cli import main
from fastpeft.layers.base_weight import is_quantized
from fastpeft.training import RunRecord, TrainedAdapter
from fastpeft.training.config import BaseOptions
from fastpeft.training.data import read_splits
from tests.tolerance import METRICS_REPEATED, assert_bits_equal
from tests.training import tiny
from tests.training.commands import fails, result, train_command

OPTIONS = ("--target-modules", "all-linear", "--learning-rate", 1e-2, "--max-new-tokens", 2, "--examples", 1)
KINDS = ["nf4", "fp4", "int8"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    tiny.write_jsonl(folder / "reviews.jsonl", tiny.reviews(80))
    tiny.write_csv(folder / "questions.csv", tiny.questions(80))
    return folder


@pytest.fixture(scope="module")
def generator(files):
    output = files / "generator"
    options = ("--quantization", "nf4", "--num-train-epochs", 2)
    assert main(train_command(files, "llama", "questions.csv", output, *OPTIONS, *options)) == 0
    return output


def test_a_run_over_nf4(files, generator):
    record = RunRecord.load(generator / "run.json")
    assert record.metrics["loss"] < record.baseline["loss"]
    assert (record.base["quantization"], record.base["blocksize"], record.base["double_quant"]) == ("nf4", 64, True)
    assert record.training["quantization"] == "nf4"
    full = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(files / "llama").parameters())
    assert record.total_parameters == full + record.trainable_parameters
    assert 0 < record.base["bytes"] < 4 * full
    page = (generator / "report.html").read_text()
    assert "linear weights in NF4 in blocks of 64, scales in 8 bits" in page
    assert "load_in_4bit=True, bnb_4bit_quant_type=&quot;nf4&quot;" in page


def test_evaluate_and_predict_use_the_same_base(files, generator, capsys):
    adapter = TrainedAdapter.load(generator, use_cpu=True)
    assert any(map(is_quantized, adapter.model.modules()))
    evaluate = ["evaluate", "--adapter", generator, "--data", files / "questions.csv", "--use-cpu"]
    capsys.readouterr()
    assert main([str(part) for part in evaluate]) == 0
    loss = result(capsys)["loss"]
    metrics, _ = adapter.evaluate(read_splits(str(files / "questions.csv"))["train"])
    assert abs(loss - metrics["loss"]) < METRICS_REPEATED * loss
    assert main(["predict", "--adapter", str(generator), "--use-cpu", "--max-new-tokens", "2", "say w3"]) == 0


def test_merge_takes_the_full_weights(files, generator, tmp_path):
    assert main(["merge", "--adapter", str(generator), "--output-dir", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(map(is_quantized, merged.modules()))
    assert not hasattr(merged.config, "quantization_config")
    whole = TrainedAdapter.load(generator, use_cpu=True, full_weights=True).model.merge_and_unload()
    name = "model.layers.0.mlp.up_proj.weight"
    assert_bits_equal(name, merged.get_parameter(name).detach(), whole.get_parameter(name).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_s_new_head_is_whole(kind, files, tmp_path, capsys):
    options = ("--quantization", kind, "--no-double-quant", "--max-steps", 2, "--target-modules", "query", "value")
    assert main(train_command(files, "bert", "reviews.jsonl", tmp_path / "out", *options)) == 0
    found = result(capsys)
    assert (found["base_quantization"], found["base_bytes"] > 0) == (kind, True)
    names = {name.split(".")[-2] for name in load_file(tmp_path / "out/adapter_model.safetensors")}
    assert names == {"lora_A", "lora_B", "classifier"}
    record = RunRecord.load(tmp_path / "out/run.json")
    assert record.base.get("double_quant") in (None, False)
    base = AutoModelForSequenceClassification.from_pretrained(files / "bert")
    assert type(base.classifier) is torch.nn.Linear


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_resumed_run_ends_with_the_same_adapter(kind, files, tmp_path):
    """Both run 6 steps with checkpoints at 3; one loses what came after the first and goes on from it."""
    options = (*OPTIONS, "--quantization", kind, "--max-steps", 6, "--eval-strategy", "steps", "--eval-steps", 3)
    options += ("--lora-dropout", 0.1, "--save-total-limit", 3)
    for name in ("whole", "resumed"):
        assert main(train_command(files, "llama", "questions.csv", tmp_path / name, *options)) == 0
    for lost in ("checkpoints/checkpoint-6", "."):
        for file in (tmp_path / "resumed" / lost).glob("*.*"):
            file.unlink() if file.is_file() else None
    assert main(train_command(files, "llama", "questions.csv", tmp_path / "resumed", *options, "--resume")) == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    for name, tensor in one.items():
        assert_bits_equal(name, two[name], tensor)


def test_refusals(files, tmp_path, capsys):
    def command(model, *options):
        return train_command(files, model, "questions.csv", tmp_path / "out", "--max-steps", 1, *options)

    with pytest.raises(SystemExit) as stop:
        main(command("llama", "--quantization", "int4"))
    assert stop.value.code == 2
    fastpeft.quantize(files / "llama", "fp4").save_pretrained(tmp_path / "fp4")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "fp4" / name).write_bytes((files / "llama" / name).read_bytes())
    fails(capsys, command(tmp_path / "fp4", "--quantization", "nf4"), "load the full weights again")
    assert not (tmp_path / "out").exists()
    assert main(command(tmp_path / "fp4")) == 0
    assert RunRecord.load(tmp_path / "out/run.json").base["quantization"] == "fp4"


def test_options_of_an_earlier_run():
    """Adapters of full models, and of runs before there was quantisation, are used as they were."""
    assert BaseOptions.as_trained({}) == BaseOptions()
    assert BaseOptions.as_trained({"dtype": "bfloat16", "bf16": True}, "float32") == BaseOptions(dtype="float32")
    saved = json.loads(json.dumps({"quantization": "fp4", "double_quant": False, "dtype": "bfloat16", "bf16": False}))
    expected = BaseOptions(quantization="fp4", double_quant=False, dtype="bfloat16")
    assert BaseOptions.as_trained(saved) == expected
    assert BaseOptions.as_trained(saved, "float32").dtype == "float32"
