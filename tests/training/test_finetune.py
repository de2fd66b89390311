"""fastpeft.finetune: one call from a model and rows to a trained adapter, for every form of both."""

import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpeft import LoraConfig, PeftModel, finetune
from fastpeft.layers.base_weight import is_quantized
from fastpeft.training import RunRecord, TrainConfig, suggested_learning_rate
from fastpeft.training.finetune import train_config
from tests.methods import gain
from tests.tolerance import assert_bits_equal
from tests.training import tiny

FAST = {"use_cpu": True, "report": False, "examples": 2, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    tiny.write_jsonl(folder / "reviews.jsonl", tiny.reviews(40))
    return folder


def test_a_path_a_list_and_a_dataset_are_the_same_rows(files, tmp_path):
    forms = {"path": files / "reviews.jsonl", "list": tiny.reviews(40), "dataset": Dataset.from_list(tiny.reviews(40))}
    losses = []
    for name, data in forms.items():
        done = finetune(files / "bert", data, output_dir=tmp_path / name, r=2, max_steps=2, logging_steps=1, **FAST)
        losses.append([entry["loss"] for entry in done.record.history if "loss" in entry])
        assert done.record.peft_config["r"] == 2
        assert done.metrics == done.record.metrics
        assert {"accuracy"} <= set(done.metrics)
    assert losses[0] == losses[1] == losses[2]
    assert done.record.data["train"]["rows"] == 36
    assert json.loads((tmp_path / "list/fastpeft_training.json").read_text())["config"]["data"] == "40 rows in memory"


def test_the_trained_model_is_what_was_saved(files, tmp_path):
    data = {"train": tiny.questions(20), "test": tiny.questions(5, seed=1)}
    done = finetune(str(files / "llama"), data, "rslora", tmp_path / "out", max_steps=2, learning_rate=1e-2, **FAST)
    assert isinstance(done.model, PeftModel)
    assert done.model.active_peft_config.use_rslora
    assert done.record.training["held_out"] == "test"
    saved = PeftModel.from_pretrained(
        type(done.model.get_base_model()).from_pretrained(files / "llama"), tmp_path / "out"
    )
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert_bits_equal("logits", done.model.eval()(input_ids=ids).logits, saved(input_ids=ids).logits)
    assert done.tokenizer("w1 w2")["input_ids"]


def test_a_loaded_model_with_and_without_its_tokenizer(files, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(files / "bert")
    done = finetune(base, tiny.reviews(20), output_dir=tmp_path / "one", max_steps=1, **FAST)
    assert done.model.get_base_model() is base
    again = AutoModelForSequenceClassification.from_pretrained(files / "bert")
    again.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"expected tokenizer=\.\.\. beside a BertForSequenceClassification"):
        finetune(again, tiny.reviews(20), output_dir=tmp_path / "two", **FAST)
    words = AutoTokenizer.from_pretrained(files / "bert")
    done = finetune(again, tiny.reviews(20), output_dir=tmp_path / "two", tokenizer=words, max_steps=1, **FAST)
    assert done.record.model == "BertForSequenceClassification"
    for wrong in (done.model, torch.nn.Linear(2, 2), 3):
        with pytest.raises(TypeError, match="expected a path, a name or a transformers model"):
            finetune(wrong, tiny.reviews(20), output_dir=tmp_path / "three")


def test_qlora_quantises_the_base(files, tmp_path):
    done = finetune(files / "llama", tiny.questions(20), "qlora", tmp_path, max_steps=1, **FAST)
    assert done.record.base["quantization"] == done.record.training["quantization"] == "nf4"
    assert any(map(is_quantized, done.model.modules()))


def test_a_method_of_another_package_and_the_rate_that_suits_it(files, tmp_path):
    """The rate is chosen when the model's size is known, and is in run.json, in every checkpoint, and where a run is resumed."""
    with gain.registered() as module:
        rows = tiny.questions(20)
        options = {"limit": 0.4, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, **FAST}
        done = finetune(files / "llama", rows, "gain", tmp_path, **options)
        assert done.record.peft_config["peft_type"] == "GAIN"
        assert isinstance(done.model.active_peft_config, module.GainConfig)
        assert done.model.active_peft_config.limit == 0.4
        expected = suggested_learning_rate("GAIN", done.record.total_parameters)
        record = RunRecord.load(tmp_path / "run.json")
        assert record.training["learning_rate"] == expected
        assert record.training["peft"]["peft_type"] == "GAIN"
        info = json.loads((tmp_path / "checkpoints/checkpoint-1/fastpeft_training.json").read_text())
        assert info["config"]["learning_rate"] == expected
        with pytest.warns(UserWarning, match="options differ") as caught:
            finetune(files / "llama", rows, "gain", tmp_path, resume=True, **options | {"max_steps": 3})
        said = [str(warning.message) for warning in caught if "options differ" in str(warning.message)]
        assert "learning_rate" not in said[0]


def test_options_go_where_they_belong():
    config, splits = train_config("m", "d", "dora", "o", {"r": 3, "bf16": True, "learning_rate": 1e-3})
    expected = TrainConfig(
        model="m", data="d", output_dir="o", peft=LoraConfig(r=3, use_dora=True), bf16=True, learning_rate=1e-3
    )
    assert (config, splits) == (expected, None)
    given = LoraConfig(r=5)
    config, _ = train_config("m", "d", given, "o", {"lora_alpha": 2})
    assert (config.peft, given) == (LoraConfig(r=5, lora_alpha=2), LoraConfig(r=5))


@pytest.mark.parametrize(
    ("method", "options", "error", "said"),
    [
        ("lora", {"lerning_rate": 1}, ValueError, r"lerning_rate -> \['learning_rate'"),
        ("lora", {"rank": 1}, ValueError, r"\['rank'\]; there are \['accelerate'"),
        ("lroa", {}, ValueError, r"lroa -> \['lora'"),
        ("lora", {"peft": 1}, ValueError, "got \\['peft'\\]"),
        ("lora", {"r": 0}, ValueError, "r=0"),
        ("lora", {"max_steps": 0, "num_train_epochs": 0}, ValueError, "num_train_epochs"),
    ],
)
def test_names_that_mean_nothing_are_refused(method, options, error, said):
    with pytest.raises(error, match=said):
        train_config("m", "d", method, "o", options)


def test_a_name_that_means_two_things_is_refused():
    @dataclass
    class WithSeed(LoraConfig):
        seed: int = 0

    with pytest.raises(ValueError, match=r"\['seed'\] are options of the training and of WithSeed"):
        train_config("m", "d", WithSeed(), "o", {"seed": 1})


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ([], ValueError, "at least one row of train"),
        ([1, 2], TypeError, "got list for train"),
        (3, TypeError, "got int for train"),
        ({"train": "x"}, TypeError, "got str for train"),
        ({"test": [{"text": "a"}]}, ValueError, "expected training rows"),
    ],
)
def test_rows_that_are_none(files, tmp_path, data, error, said):
    with pytest.raises(error, match=said):
        finetune(files / "llama", data, output_dir=tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()
