"""What fastpeft.training.Trainer adds to transformers.Trainer."""

import json

import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, TrainerCallback, TrainingArguments

from fastpeft import LoraConfig, get_peft_model
from fastpeft.training.data import Columns
from fastpeft.training.labels import label_names
from fastpeft.training.run_folder import TrainingInfo
from fastpeft.training.text_format import TextFormat
from fastpeft.training.tokenise import Collator, tokenise_causal_lm, tokenise_classification
from fastpeft.training.trainer import GroupedByLength, Trainer, classification_loss, last_checkpoint, warmup_steps
from tests.tolerance import METRICS_REPEATED, assert_bits_equal, assert_no_worse
from tests.training import tiny


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def _classifier(bert, dtype=torch.float32):
    """The same values for every dtype: they are drawn in float32 and converted."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(bert, attention_probs_dropout_prob=0.0)
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).to(dtype)


def _generator(llama, dtype=torch.float32):
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(llama)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).to(dtype)


def _review_features(count):
    rows, columns = Dataset.from_list(tiny.reviews(count)), Columns(text="text", label="label")
    labels = label_names(rows["label"])
    return tokenise_classification(rows, columns, labels, tiny.tokenizer(encoder=True), TextFormat(), "train").features


def _question_features(count):
    rows, columns = Dataset.from_list(tiny.questions(count)), Columns(prompt="prompt", response="response")
    return tokenise_causal_lm(rows, columns, tiny.tokenizer(), TextFormat(train_on_prompt=True), "train").features


class _KeepGradients(TrainerCallback):
    """Copies of all gradients of the first optimizer step, by parameter name."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            self.gradients = {name: parameter.grad.clone() for name, parameter in trained}


def _gradients(model, features, words, folder, batch, accumulation, **options):
    keep = _KeepGradients()
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model, arguments, train_dataset=features, data_collator=Collator(words), callbacks=[keep], **options
    ).train()
    return keep.gradients


@pytest.mark.parametrize("rows", [8, 7], ids=["even", "short last batch"])
@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_accumulated_gradients_equal_those_of_one_batch(kind, rows, bert, llama, tmp_path):
    """4 batches of 2 are one batch of 8: rows (classes) and tokens (causal LM) weigh alike, also in a short last batch.

    transformers' own Trainer gives 4 times the gradient for BERT, whose forward takes num_items_in_batch and ignores it.
    """
    if kind == "classification":
        build, features, words = (
            lambda dtype: _classifier(bert, dtype),
            _review_features(rows),
            tiny.tokenizer(encoder=True),
        )
        options = {"compute_loss_func": classification_loss}
    else:
        build, features, words = lambda dtype: _generator(llama, dtype), _question_features(rows), tiny.tokenizer()
        options = {}
    exact = _gradients(build(torch.float64), features, words, tmp_path, 8, 1, **options)
    one = _gradients(build(torch.float32), features, words, tmp_path, 8, 1, **options)
    four = _gradients(build(torch.float32), features, words, tmp_path, 2, 4, **options)
    assert set(exact) == set(one) == set(four)
    for name, gradient in exact.items():
        assert gradient.abs().max() > 0, name
        assert_no_worse(name, four[name], gradient.double(), one[name], factor=4.0)


def test_the_base_models_signature_is_read(bert, llama, tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True)
    model = _classifier(bert)
    trainer = Trainer(model, arguments, train_dataset=_review_features(4), data_collator=Collator(tiny.tokenizer()))
    assert trainer.model is model
    assert trainer.label_names == ["labels"]
    assert set(next(iter(trainer.get_train_dataloader()))) == {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "labels",
    }
    causal = Trainer(_generator(llama), arguments, data_collator=Collator(tiny.tokenizer()))
    assert causal.model_accepts_loss_kwargs
    assert causal._loss_shifts_labels


def test_checkpoints_hold_the_adapter_alone_and_the_best_comes_back(bert, tmp_path):
    """The first checkpoint is the best by a metric that only falls: at the end the model has its tensors, trainable still."""
    scores = iter([0.9, 0.5, 0.4])
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=1e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    features = _review_features(8)
    model = _classifier(bert)
    info = TrainingInfo("classification", str(bert), ["negative", "positive"])
    trainer = Trainer(
        model,
        arguments,
        info=info,
        train_dataset=features,
        eval_dataset=features,
        data_collator=Collator(tiny.tokenizer(encoder=True)),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    first, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"
    assert {path.name for path in first.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "fastpeft_training.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    assert TrainingInfo.load(first) == info
    assert trainer.state.best_model_checkpoint == str(first)
    model.save_pretrained(tmp_path / "best")
    best, tensors = (
        load_file(tmp_path / "best/adapter_model.safetensors"),
        load_file(first / "adapter_model.safetensors"),
    )
    for name, tensor in tensors.items():
        assert_bits_equal(name, best[name], tensor)
    changed = load_file(last / "adapter_model.safetensors")
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in tensors.items())
    assert model.get_nb_trainable_parameters()[0] == sum(tensor.numel() for tensor in tensors.values())


def test_an_evaluation_leaves_the_random_state_as_it_was(bert, tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
    collate = Collator(tiny.tokenizer(encoder=True))
    trainer = Trainer(_classifier(bert), arguments, eval_dataset=_review_features(4), data_collator=collate)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_an_adapter_passes_through(llama, tmp_path):
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, save_strategy="steps", save_steps=1, report_to="none", use_cpu=True
    )
    model = LlamaForCausalLM.from_pretrained(llama)
    Trainer(model, arguments, train_dataset=_question_features(4), data_collator=Collator(tiny.tokenizer())).train()
    assert (tmp_path / "checkpoint-1/model.safetensors").is_file()


@pytest.mark.parametrize(("rows", "batch"), [(1000, 8), (1003, 8), (5, 8), (1, 1)])
def test_rows_grouped_by_length_are_a_permutation_of_similar_batches(rows, batch):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (rows,), generator=generator).tolist()
    sampler = GroupedByLength(lengths, batch, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(rows))
    assert list(sampler) == order
    if rows >= 1000:
        sampler.set_epoch(1)
        assert list(sampler) != order
        spread = [max(lengths[i] for i in part) - min(lengths[i] for i in part) for part in DataLoader(order, batch)]
        assert torch.tensor(spread).double().mean() < 10  # 77 for batches at random


def test_every_epoch_has_its_own_order(bert, tmp_path):
    """accelerate's loader passes the epoch on to the sampler, also when it skips batches after a resume."""
    arguments = TrainingArguments(
        output_dir=tmp_path, train_sampling_strategy="group_by_length", report_to="none", use_cpu=True
    )
    collate = Collator(tiny.tokenizer(encoder=True))
    loader = Trainer(_classifier(bert), arguments, train_dataset=_review_features(32), data_collator=collate)
    loader = loader.get_train_dataloader()
    orders = []
    for epoch in range(2):
        for batches in (loader, skip_first_batches(loader, 1)):
            batches.set_epoch(epoch)
            orders.append([batch["input_ids"].tolist() for batch in batches])
    assert orders[0] != orders[2]
    assert orders[0][1:] == orders[1]
    assert orders[2][1:] == orders[3]


def test_only_a_checkpoint_that_was_written_to_its_end_counts(tmp_path):
    names = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    for step, state in (("2", '{"global_step": 2}'), ("10", '{"global_step": 10}'), ("12", '{"global_'), ("14", None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize(
    ("ratio", "rows", "batch", "epochs", "max_steps", "expected"),
    [(0.1, 100, 10, 3.0, -1, 3), (0.1, 101, 10, 3.0, -1, 4), (0.5, 100, 10, 3.0, 7, 4), (0.0, 9, 2, 1.0, -1, 0)],
)
def test_warmup_steps(ratio, rows, batch, epochs, max_steps, expected):
    assert warmup_steps(ratio, rows, batch, epochs, max_steps) == expected


# -- a loop of your own -------------------------------------------------------------------------------------------------


def _loop_arguments(folder, **options):
    given = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.05,
    }
    plain = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "logging_steps": 1}
    return TrainingArguments(output_dir=folder, train_sampling_strategy="sequential", **given | plain | options)


class _KeepSteps(TrainerCallback):
    """What was logged of every step."""

    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.steps.append({name: logs[name] for name in ("loss", "learning_rate", "grad_norm")})


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=["plain", "two", "bf16"]
)
def test_train_step_in_a_loop_is_what_train_does(kind, options, bert, llama, tmp_path):
    """The same batches: the same losses, rates, norms and trained values, also of short batches and where gradients are cut."""
    if kind == "classification":
        build, features, words = lambda: _classifier(bert), _review_features(11), tiny.tokenizer(encoder=True)
        more = {"compute_loss_func": classification_loss}
    else:
        build, features, words, more = lambda: _generator(llama), _question_features(11), tiny.tokenizer(), {}
    keep = _KeepSteps()
    make = {"train_dataset": features, "data_collator": Collator(words), **more}
    trained = Trainer(build(), _loop_arguments(tmp_path, **options), callbacks=[keep], **make)
    trained.train()
    own = Trainer(build(), _loop_arguments(tmp_path, **options), **make)
    batches, count, steps = list(own.get_train_dataloader()), options.get("gradient_accumulation_steps", 1), []
    for first in range(0, 3 * count, count):
        given = batches[first : first + count]
        steps.append(own.train_step(given[0] if count == 1 else given))
    assert len(keep.steps) == 3
    for step, logged in zip(steps, keep.steps, strict=True):
        assert step == pytest.approx(logged, rel=METRICS_REPEATED)
    assert {step["grad_norm"] > 0.05 for step in steps} == {True}
    assert own.state.global_step == 3
    for (name, parameter), (_, expected) in zip(
        own.model.named_parameters(), trained.model.named_parameters(), strict=True
    ):
        assert_bits_equal(name, parameter, expected)


def test_one_batch_is_cut_into_the_parts_of_a_step(llama, tmp_path):
    """7 rows with accumulation over 3: one step of 3, 3 and 1 rows, whose loss and gradients are those of all 7."""
    features, make = _question_features(7), {"data_collator": Collator(tiny.tokenizer())}
    whole = Trainer(_generator(llama), _loop_arguments(tmp_path), **make)
    parts = Trainer(_generator(llama), _loop_arguments(tmp_path, gradient_accumulation_steps=3), **make)
    batch = whole.data_collator([dict(row) for row in features])
    assert [len(part["labels"]) for part in parts._parts_of(batch)] == [3, 3, 1]
    one, three = whole.train_step(batch), parts.train_step(batch)
    assert three == pytest.approx(one, rel=METRICS_REPEATED)
    assert whole.state.global_step == parts.state.global_step == 1


def test_train_step_refuses_what_it_cannot_do(llama, tmp_path):
    trainer = Trainer(
        _generator(llama), _loop_arguments(tmp_path, max_steps=-1), data_collator=Collator(tiny.tokenizer())
    )
    for batch in ({}, [], [{}]):
        with pytest.raises(ValueError, match="train_step: expected a batch"):
            trainer.train_step(batch)
    batch = trainer.data_collator([dict(row) for row in _question_features(2)])
    with pytest.raises(ValueError, match=r"expected args.max_steps, or a train_dataset"):
        trainer.train_step(batch)
