"""Training, evaluating, interrupting and using prompts: the scores are those of the tokens, not of the virtual ones."""

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, TrainerCallback, TrainingArguments

from fastpeft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from fastpeft.training import TrainConfig, Trainer, engine
from fastpeft.training.metrics import causal_lm_metrics, token_scores
from fastpeft.training.predict import TrainedAdapter
from fastpeft.training.tokenise import Collator
from fastpeft.training.trainer import classification_loss
from tests.tolerance import METRICS_REPEATED, assert_bits_equal, assert_close
from tests.training import tiny

CONFIGS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"),
    "encoder": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    tiny.llama(folder / "llama")
    tiny.bert(folder / "bert")
    tiny.write_jsonl(folder / "questions.jsonl", tiny.questions(120))
    tiny.write_jsonl(folder / "reviews.jsonl", tiny.reviews(160))
    return folder


def run(files, output, kind, data="questions", model="llama", **options):
    settings = {
        "learning_rate": 0.02,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "examples": 1,
        "max_new_tokens": 3,
        "report": False,
        "use_cpu": True,
    } | options
    config = TrainConfig(
        model=str(files / model),
        data=str(files / f"{data}.jsonl"),
        output_dir=str(output),
        peft=CONFIGS[kind] if isinstance(kind, str) else kind,
        **settings,
    )
    return engine.train(config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_classifier_learns(files, tmp_path, kind):
    record = run(
        files, tmp_path, kind, "reviews", "bert", num_train_epochs=6, learning_rate={"prefix": 0.1}.get(kind, 0.02)
    )
    assert record.metrics["loss"] < 0.8 * record.baseline["loss"]
    assert "base_model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    adapter = TrainedAdapter.load(tmp_path, use_cpu=True)
    assert len(adapter.classify(["lovely warm", "dull grim"])) == 2
    metrics, _ = adapter.evaluate(Dataset.from_list(tiny.reviews(160)))
    assert metrics["accuracy"] > 0.5


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_causal_lm_is_scored_on_its_tokens(files, tmp_path, kind):
    record = run(files, tmp_path, kind, num_train_epochs=4)
    assert record.metrics["loss"] < record.baseline["loss"]
    assert record.metrics["tokens"] == record.baseline["tokens"]
    evaluated = [entry for entry in record.history if "eval_loss" in entry]
    best = min(entry["eval_loss"] for entry in evaluated)
    assert math.isclose(best, record.metrics["loss"], rel_tol=METRICS_REPEATED)
    adapter = TrainedAdapter.load(tmp_path, use_cpu=True)
    assert len(adapter.generate(["say w1 w2"], max_new_tokens=3)) == 1
    metrics, _ = adapter.evaluate(Dataset.from_list(tiny.questions(20, seed=5)))
    assert metrics["tokens"] == 40


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_without_padding_one_row_at_a_time(files, kind):
    """Every token's loss, taken from the logits at its place after the prompt."""
    torch.manual_seed(0)
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(files / "llama"), CONFIGS[kind]).eval()
    rows = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    collate = Collator(tiny.tokenizer())
    batch = collate([{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in rows])
    labels = batch.pop("labels")
    with torch.no_grad():
        scores = token_scores(wrapped(**batch).logits, labels)
        total = 0.0
        for ids in rows:
            logits = wrapped(input_ids=torch.tensor([ids])).logits[0][-len(ids) :]
            chosen = torch.log_softmax(logits[:-1].double(), -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            total -= chosen.sum()
    assert_close("loss", torch.tensor(causal_lm_metrics(scores.numpy())["loss"]), (total / 8).float(), METRICS_REPEATED)


def test_the_trainers_own_loss_of_a_causal_lm(files, tmp_path):
    """Without metrics of its own, Trainer reports the model's loss: labels of virtual tokens are left out, so that a prompt
    before the row changes nothing but what it predicts; the first token, which follows the prompt, has a loss too.
    """
    torch.manual_seed(0)
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(files / "llama"), CONFIGS["prompt"])
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 8], [9, 10, 11, 12])])
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    loss = Trainer(wrapped, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    ids = torch.tensor(rows["input_ids"][:])
    with torch.no_grad():
        logits = wrapped(input_ids=ids).logits[:, 3:-1]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1))
    assert math.isclose(loss, expected.item(), rel_tol=METRICS_REPEATED)


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 19:
            raise KeyboardInterrupt


RESUMED = {
    "mlp": CONFIGS["encoder"],
    "lstm": PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", encoder_dropout=0.2
    ),
    "projected": PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8),
    "prompt": CONFIGS["prompt"],
}


@pytest.mark.parametrize("kind", RESUMED)
def test_an_interrupted_run_resumes_to_the_same_bits(files, tmp_path, monkeypatch, kind):
    """Stopped at step 19 of 28, with a checkpoint at 16."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 8,
        "load_best_model_at_end": False,
        "baseline": False,
        "examples": 0,
    }
    run(files, tmp_path / "whole", RESUMED[kind], **options)

    class Stopping(Trainer):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, callbacks=[_Stop()], **more)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "Trainer", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run(files, tmp_path / "stopped", RESUMED[kind], **options)
    run(files, tmp_path / "stopped", RESUMED[kind], **options, resume=True)
    for name in ("adapter_model.safetensors", "training_state.safetensors"):
        if not (tmp_path / "whole" / name).exists():
            assert kind == "prompt"
            continue
        whole, stopped = (load_file(tmp_path / folder / name) for folder in ("whole", "stopped"))
        assert set(whole) == set(stopped)
        for key, tensor in whole.items():
            assert_bits_equal(key, stopped[key], tensor)


def test_the_trainer_gives_a_multitask_prompt_its_tasks(files, tmp_path):
    """Gradient accumulation and a last short batch, too; a task that no row has is not trained."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(files / "bert", num_labels=2)
    wrapped = get_peft_model(base, MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3))
    before = {name: tensor.clone() for name, tensor in wrapped.base_model.prompts["default"].named_parameters()}
    rows = Dataset.from_list(
        [{"input_ids": [2, 5 + i, 3], "labels": i % 2, "task_ids": 2 * (i % 2), "other": "x"} for i in range(10)]
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=4, learning_rate=0.01,
        per_device_train_batch_size=3, gradient_accumulation_steps=2, save_strategy="no",
    )  # fmt: skip
    Trainer(wrapped, arguments, train_dataset=rows, compute_loss_func=classification_loss).train()
    after = dict(wrapped.base_model.prompts["default"].named_parameters())
    for name in ("prefix_task_cols", "prefix_task_rows"):
        moved = (after[name] != before[name]).flatten(1).any(dim=1)
        assert moved.tolist() == [True, False, True]


def test_options_that_a_prompt_cannot_have(files, tmp_path):
    with pytest.raises(ValueError, match="gradient_checkpointing: expected False with PREFIX_TUNING"):
        run(files, tmp_path / "a", "prefix", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="64 positions less the prompt's 4, got 61"):
        run(files, tmp_path / "b", "prompt", max_length=61)
    with pytest.raises(ValueError, match="64 positions less the prompt's 64"):
        run(files, tmp_path / "c", PromptTuningConfig(num_virtual_tokens=64))
    assert not list(tmp_path.iterdir())


def test_text_leaves_room_for_the_prompt(files, tmp_path):
    """BERT has 64 positions; a review of 80 words and a prompt of 10 tokens must fit."""
    rows = [{"text": " ".join(["lovely" if i % 2 else "dull"] * 80), "label": i % 2} for i in range(8)]
    tiny.write_jsonl(files / "long.jsonl", rows)
    run(files, tmp_path, PromptEncoderConfig(num_virtual_tokens=10), "long", "bert", num_train_epochs=1)
    info = json.loads((tmp_path / "fastpeft_training.json").read_text(encoding="utf-8"))
    assert info["text_format"]["max_length"] == 54
    assert len(TrainedAdapter.load(tmp_path, use_cpu=True).classify([rows[0]["text"]])) == 1


def test_checkpointing_trains_a_prompt(files, tmp_path):
    kept = run(files, tmp_path / "kept", "encoder", num_train_epochs=1)
    again = run(files, tmp_path / "again", "encoder", num_train_epochs=1, gradient_checkpointing=True)
    assert math.isclose(kept.metrics["loss"], again.metrics["loss"], rel_tol=METRICS_REPEATED)
