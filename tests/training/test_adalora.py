"""AdaLoRA under the Trainer: the run fills in the schedule's length and drives it, the penalty counts once, a resumed run ends
with the same bits.
"""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from fastpeft import AdaLoraConfig, PeftModel, finetune, get_peft_model
from fastpeft.checkpoint import TENSORS_NAME, TRAINING_NAME
from fastpeft.cli import main
from fastpeft.training import TrainConfig, Trainer, engine
from fastpeft.training.trainer import total_steps
from tests.tiny_models import fill, small_llama, token_ids
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close
from tests.training import tiny
from tests.training.commands import fails, train_command

OPTIONS = {"init_r": 4, "target_r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora")
    tiny.llama(folder / "model")
    tiny.bert(folder / "bert")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.questions(120))
    tiny.write_jsonl(folder / "reviews.jsonl", tiny.reviews(40))
    return folder


# -- the penalty ----------------------------------------------------------------------------------------------------------


def wrapped():
    torch.manual_seed(0)
    model = get_peft_model(small_llama(), AdaLoraConfig(**OPTIONS, total_step=20, task_type="CAUSAL_LM"))
    fill(model)
    return model.train()


def logits_loss(outputs, labels, num_items_in_batch=None):
    """The causal LM's own loss."""
    assert outputs.get("loss") is None
    shifted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(*shifted, reduction="sum")
    return total / (labels[:, 1:].numel() if num_items_in_batch is None else num_items_in_batch)


class Steps(TrainerCallback):
    """Gradients of the first step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(folder, batches, **options):
    model, seen = wrapped(), Steps()
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=4 // batches,
        gradient_accumulation_steps=batches,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in token_ids(4)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[seen], **options)
    trainer.train()
    return seen.gradients, torch.tensor(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("batches", [1, 2, 4])
@pytest.mark.parametrize("own_loss", [False, True], ids=["model_s_loss", "loss_from_logits"])
def test_the_penalty_counts_once_a_step(own_loss, batches, tmp_path):
    """PEFT adds it to every accumulated batch, and not at all where the loss is computed from logits."""
    model = wrapped()
    loss = model(input_ids=token_ids(4), labels=token_ids(4)).loss
    loss.backward()
    gradients, logged = one_step(tmp_path, batches, compute_loss_func=logits_loss if own_loss else None)
    assert_close("loss", logged.double(), loss.detach().double().round(decimals=4), GRADIENTS_THROUGH_A_MODEL)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(name, gradients[name], parameter.grad, GRADIENTS_THROUGH_A_MODEL)


def test_an_evaluation_s_loss_has_no_penalty(tmp_path):
    model = wrapped()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=4)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in token_ids(4)]
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    own = model.get_base_model().eval()(input_ids=token_ids(4), labels=token_ids(4)).loss
    assert_close("loss", torch.tensor(found), own.detach(), OTHER_ORDER_OF_SUMS)


# -- the schedule ---------------------------------------------------------------------------------------------------------


def test_the_trainer_s_steps_are_those_of_a_loop_of_one_s_own(tmp_path):
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in token_ids(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=4,
        max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    trained, own = wrapped(), wrapped()
    Trainer(trained, arguments, train_dataset=rows).train()
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(1, 21):
        own(input_ids=token_ids(4), labels=token_ids(4)).loss.backward()
        optimizer.step()
        own.update_and_allocate(step)
        optimizer.zero_grad()
    patterns = [model.peft_config["default"].rank_pattern for model in (trained, own)]
    assert patterns[0] == patterns[1]
    assert sum(map(sum, patterns[0].values())) == 4
    values = dict(own.named_parameters())
    for name, parameter in trained.named_parameters():
        assert_close(name, parameter, values[name], GRADIENTS_THROUGH_A_MODEL)


def test_train_step_drives_it_too(tmp_path):
    model = wrapped()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(model, arguments)
    batch = {"input_ids": token_ids(4), "labels": token_ids(4)}
    for _ in range(20):
        trainer.train_step(batch)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 4


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "max_steps", "expected"),
    [(10, 4, 2, -1, 6), (10, 4, 1.5, -1, 5), (10, 4, 2, 3, 3), (1, 8, 1, -1, 1)],
)
def test_total_steps(rows, batch, epochs, max_steps, expected):
    assert total_steps(rows, batch, epochs, max_steps) == expected


def test_a_run_fills_in_its_own_length_and_ends_at_the_target(files, tmp_path):
    found = finetune(
        str(files / "bert"), str(files / "reviews.jsonl"), "adalora", tmp_path, init_r=4, target_r=2, num_train_epochs=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True, baseline=False, report=False, examples=0,
        load_best_model_at_end=False,
    )  # fmt: skip
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["total_step"] == max(entry["step"] for entry in found.record.history)
    assert sum(map(sum, saved["rank_pattern"].values())) == 2 * len(saved["rank_pattern"])
    tensors = load_file(tmp_path / TENSORS_NAME)
    assert sum(t.shape[0] for key, t in tensors.items() if key.endswith("lora_E")) == 2 * len(saved["rank_pattern"])


def test_the_command_line(files, tmp_path, capsys):
    """--total-step is not needed; a schedule that the run is too short for is refused before anything is written."""
    quick = ("--no-baseline", "--no-report", "--examples", 0, "--max-steps", 6, "--learning-rate", 0.01)
    own = ("--method", "adalora", "--init-r", 4, "--target-r", 2)
    command = train_command(files, "model", "rows.jsonl", tmp_path / "out", *quick, *own)
    fails(capsys, [*command, "--tinit", 6], "train longer")
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["total_step"], saved["peft_type"]) == (6, "ADALORA")
    assert main(["inspect", "--model", str(files / "model"), *map(str, own)]) == 0
    assert "lora_E" in capsys.readouterr().out


# -- resuming -------------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Interrupts the process, as Ctrl-C does, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


SCHEDULES = {  # of 28 steps; the checkpoint is at 16, right after an allocation
    "while_ranks_fall": {"tinit": 2, "tfinal": 4, "deltaT": 2},
    "before": {"tinit": 18, "tfinal": 2, "deltaT": 1},
    "after": {"tinit": 2, "tfinal": 16, "deltaT": 1},
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_an_interrupted_run_resumes_to_the_same_bits(files, tmp_path, monkeypatch, schedule):
    """A checkpoint's adapter file is pruned, and triples that it lacks can come back: the side file has them."""

    def config(output, **more):
        return TrainConfig(
            model=str(files / "model"),
            data=str(files / "rows.jsonl"),
            output_dir=str(tmp_path / output),
            peft=AdaLoraConfig(**OPTIONS, lora_dropout=0.2, **schedule),
            learning_rate=0.01,
            per_device_train_batch_size=8,
            num_train_epochs=2,
            eval_strategy="steps",
            eval_steps=8,
            load_best_model_at_end=False,
            examples=0,
            baseline=False,
            report=False,
            use_cpu=True,
            **more,
        )

    engine.train(config("whole"))

    class Stopping(Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, callbacks=[Stop(19)], **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "Trainer", Stopping)
        with pytest.raises(KeyboardInterrupt):
            engine.train(config("stopped"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="resume")
        engine.train(config("stopped", resume=True))
    for name in (TENSORS_NAME, TRAINING_NAME):
        whole, stopped = load_file(tmp_path / "whole" / name), load_file(tmp_path / "stopped" / name)
        assert set(whole) == set(stopped)
        for key, tensor in whole.items():
            assert_bits_equal(key, stopped[key], tensor)
    configs = [(tmp_path / folder / "adapter_config.json").read_text() for folder in ("whole", "stopped")]
    assert configs[0] == configs[1]
    assert sum(map(sum, json.loads(configs[0])["rank_pattern"].values())) == 8


def test_the_best_checkpoint_is_saved_with_its_own_ranks(files, tmp_path):
    """The best evaluation is before the last allocation: its adapter has more triples than the model at the end."""
    config = TrainConfig(
        model=str(files / "model"),
        data=str(files / "rows.jsonl"),
        output_dir=str(tmp_path / "out"),
        peft=AdaLoraConfig(**OPTIONS, tinit=1),
        learning_rate=0.3,  # gets worse
        per_device_train_batch_size=8,
        max_steps=12,
        eval_strategy="steps",
        eval_steps=3,
        save_total_limit=9,
        examples=0,
        baseline=False,
        report=False,
        use_cpu=True,
        metric_for_best_model="loss",
    )
    record = engine.train(config)
    losses = {entry["step"]: entry["eval_loss"] for entry in record.history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best < 12, losses
    saved, kept = (
        load_file(f / TENSORS_NAME) for f in (tmp_path / "out", tmp_path / f"out/checkpoints/checkpoint-{best}")
    )
    assert set(saved) == set(kept)
    for key, tensor in saved.items():
        assert_bits_equal(key, tensor, kept[key])
    from transformers import LlamaForCausalLM

    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(files / "model"), tmp_path / "out")
