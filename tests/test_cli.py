"""The command line: what it prints, writes, and refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpeft.cli import COMMANDS, main
from fastpeft.training import RunRecord, TrainedAdapter, engine
from tests.tolerance import MERGED_EQUALS_UNMERGED, METRICS_REPEATED, assert_close
from tests.training import tiny
from tests.training.commands import fails, result, train_command

ROOT = Path(__file__).parents[1]
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tiny models and data, and an adapter of each task trained on them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    tiny.llama(folder / "chat", chat_template=tiny.CHAT_TEMPLATE, pad_is_end=True)
    tiny.write_jsonl(folder / "reviews.jsonl", tiny.reviews(240))
    tiny.write_jsonl(folder / "reviews_test.jsonl", tiny.reviews(60, seed=1))
    tiny.write_csv(folder / "questions.csv", tiny.questions(200))
    return folder


@pytest.fixture(scope="module")
def classifier(files):
    targets = ("--target-modules", "query", "key", "value", "dense")
    options = ("--test-data", files / "reviews_test.jsonl", "--lora-alpha", 16, "--learning-rate", 6e-3)
    output = files / "classifier"
    assert main(train_command(files, "bert", "reviews.jsonl", output, *options, *targets, "--num-train-epochs", 4)) == 0
    return output


@pytest.fixture(scope="module")
def generator(files):
    options = (
        "--target-modules",
        "all-linear",
        "--learning-rate",
        2e-2,
        "--max-new-tokens",
        3,
        "--num-train-epochs",
        3,
    )
    output = files / "generator"
    assert main(train_command(files, "llama", "questions.csv", output, *options)) == 0
    return output


def test_train_classification(files, classifier):
    record = RunRecord.load(classifier / "run.json")
    assert (record.task, record.labels) == ("classification", ["negative", "positive"])
    assert record.metrics["accuracy"] > 0.9 > 0.7 > record.baseline["accuracy"]
    assert {"accuracy", "f1", "precision", "recall", "roc_auc", "loss"} <= set(record.metrics)
    assert record.data["train"]["rows"] + record.data["validation"]["rows"] == 240
    assert record.data["test"]["rows"] == 60
    assert record.training["held_out"] == "test"
    assert sum(map(sum, record.confusion)) == 60
    assert len(record.examples) == 8
    assert {"text", "label", "before", "after", "probability"} == set(record.examples[0])
    assert any("eval_accuracy" in entry for entry in record.history)
    tensors = load_file(classifier / TENSORS)
    assert record.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert record.adapter_bytes == (classifier / TENSORS).stat().st_size
    assert (classifier / "report.html").stat().st_size > 1000


def test_train_causal_lm(generator):
    record = RunRecord.load(generator / "run.json")
    assert record.task == "causal_lm"
    assert record.metrics["loss"] < 0.7 * record.baseline["loss"]
    assert {"loss", "perplexity", "token_accuracy", "exact_match", "tokens"} == set(record.metrics)
    assert {"prompt", "response", "before", "after"} == set(record.examples[0])
    assert json.loads((generator / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_plain_text_without_held_out_rows(files, tmp_path, capsys):
    rows = [{"text": f"{row['prompt']} {row['response']}"} for row in tiny.questions(20)]
    tiny.write_jsonl(tmp_path / "texts.jsonl", rows)
    options = ("--data", tmp_path / "texts.jsonl", "--validation-fraction", 0, "--max-steps", 1)
    assert main(train_command(files, "chat", "questions.csv", tmp_path / "out", *options)) == 0
    found = result(capsys)
    assert found["train_loss"] > 0
    assert not {"loss", "baseline_loss"} & set(found)
    text_format = json.loads((tmp_path / "out/fastpeft_training.json").read_text())["text_format"]
    assert (text_format["prompt_format"], text_format["separator"]) == ("plain", "")


def test_the_last_line_of_a_process_is_its_result(files, tmp_path):
    """One run as a user starts it: standard output holds one JSON line alone, progress is on standard error."""
    options = ("--max-steps", 2, "--eval-strategy", "no", "--bf16", "--gradient-checkpointing", "--examples", 1)
    command = train_command(files, "chat", "questions.csv", tmp_path / "out", *options, "--max-new-tokens", 2)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "fastpeft", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    expected = {"loss", "perplexity", "trainable_parameters", "seconds", "peak_memory_mb", "adapter", "baseline_loss"}
    assert expected <= set(result)
    assert result["adapter"] == str(tmp_path / "out")
    assert 100 < result["peak_memory_mb"] < 10_000
    assert "evaluate" in done.stderr


def test_help_needs_neither_torch_nor_transformers():
    program = (
        "import sys; from fastpeft.cli import main; code = main(['--help'])\n"
        "sys.exit(code or bool({'torch', 'transformers', 'tyro', 'datasets'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "options" in capsys.readouterr().out


def test_every_option_of_lora_is_a_flag_and_arrives(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "train", lambda config: seen.append(config) or RunRecord("t", "causal_lm", "m"))
    options = "--r 4 --lora_alpha 8 --lora-dropout 0.1 --bias lora_only --use-rslora --init-lora-weights gaussian"
    lists = "--target-modules q_proj v_proj --modules-to-save norm --rank-pattern q_proj 2 --layers-to-transform 0 1"
    assert main(f"train --model m --data d --output-dir o {options} {lists}".split()) == 0
    peft = seen[0].peft
    assert (peft.r, peft.lora_alpha, peft.lora_dropout, peft.bias) == (4, 8, 0.1, "lora_only")
    assert (peft.use_rslora, peft.init_lora_weights, peft.rank_pattern) == (True, "gaussian", {"q_proj": 2})
    assert (peft.target_modules, peft.modules_to_save, peft.layers_to_transform) == (
        ["q_proj", "v_proj"],
        ["norm"],
        [0, 1],
    )
    for given, meant in (
        ("all-linear", "all-linear"),
        (r".*\.q_proj", r".*\.q_proj"),
        ("attn.q_proj", ["attn.q_proj"]),
    ):
        assert main(["train", "--model", "m", "--data", "d", "--output-dir", "o", "--target-modules", given]) == 0
        assert seen[-1].peft.target_modules == meant


def test_evaluate_repeats_the_training_metrics(files, classifier, generator, capsys):
    assert main(["evaluate", "--adapter", str(classifier), "--data", str(files / "reviews_test.jsonl")]) == 0
    found, trained = result(capsys), RunRecord.load(classifier / "run.json").metrics
    assert {name: found[name] for name in trained} == pytest.approx(trained, rel=METRICS_REPEATED)
    assert (found["rows"], found["split"]) == (60, "train")
    assert (
        main(["evaluate", "--adapter", str(generator), "--data", str(files / "questions.csv"), "--max-rows", "50"]) == 0
    )
    assert result(capsys)["perplexity"] < RunRecord.load(generator / "run.json").baseline["perplexity"]


def test_a_checkpoint_and_an_adapter_without_side_file_can_be_used(files, classifier, capsys, tmp_path):
    checkpoint = next((classifier / "checkpoints").iterdir())
    assert main(["evaluate", "--adapter", str(checkpoint), "--data", str(files / "reviews_test.jsonl")]) == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in (TENSORS, "adapter_config.json"):
        shutil.copy(classifier / name, foreign)
    assert main(["predict", "lovely w1", "--adapter", str(foreign)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert (line["prediction"], set(line["probabilities"])) == ("1", {"0", "1"})


def test_predict_labels_in_order(files, classifier, tmp_path, capsys):
    output = tmp_path / "labels.jsonl"
    command = ["predict", "--adapter", classifier, "--input", files / "reviews_test.jsonl", "--output", output]
    assert main([str(part) for part in [*command, "--batch-size", 7]]) == 0
    assert result(capsys)["rows"] == 60
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == [row["text"] for row in tiny.reviews(60, seed=1)]
    assert sum(line["prediction"] == line["label"] for line in lines) / 60 > 0.9
    assert main(["predict", "w1 dull w2", "lovely", "", "--adapter", str(classifier)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("prediction") for line in printed[:2]] == ["negative", "positive"]
    assert len(printed) == 4
    fails(capsys, command, "the file exists")


def test_predict_responses_do_not_depend_on_the_batch(files, generator, tmp_path, capsys):
    """Prompts of different lengths in one batch are padded on the left and masked."""
    answers = []
    for size in (1, 16):
        output = tmp_path / f"{size}.jsonl"
        command = ["predict", "--adapter", generator, "--input", files / "questions.csv", "--output", output]
        assert main([str(part) for part in [*command, "--batch-size", size, "--max-new-tokens", 3]]) == 0
        answers.append([json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


@pytest.mark.parametrize("kind", ["classifier", "generator"])
def test_merge_gives_a_plain_model_with_the_same_outputs(kind, request, tmp_path, capsys):
    adapter = request.getfixturevalue(kind)
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(adapter), "--output-dir", str(merged)]) == 0
    assert result(capsys)["merged"] == str(merged)
    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModelForCausalLM
    plain = auto.from_pretrained(merged).eval()
    ids = torch.tensor([[2, 9, 10, 3]])
    with torch.no_grad():
        expected = TrainedAdapter.load(adapter, use_cpu=True).model(input_ids=ids).logits
        got = plain(input_ids=ids).logits
    assert_close("logits", got, expected, MERGED_EQUALS_UNMERGED)
    if kind == "classifier":
        assert plain.config.id2label == {0: "negative", 1: "positive"}
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    fails(capsys, ["merge", "--adapter", adapter, "--output-dir", merged], "is not empty")
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path != merged]


def test_inspect(files, classifier, capsys):
    assert main(["inspect", "--adapter", str(classifier)]) == 0
    printed = capsys.readouterr().out.splitlines()
    tensors = load_file(classifier / TENSORS)
    assert json.loads(printed[-1])["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert all(any(line.startswith(name) for line in printed) for name in tensors)
    options = ["--target-modules", "query", "key", "value", "dense", "--task", "classification"]
    assert main(["inspect", "--model", str(files / "bert"), *options]) == 0
    counted = result(capsys)["trainable_parameters"]
    assert counted == RunRecord.load(classifier / "run.json").trainable_parameters
