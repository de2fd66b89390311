"""A training's state in parts, in one process: it is complete or not there, and what a killed run left does no harm."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from fastpeft import LoraConfig, get_peft_model
from fastpeft.training import Trainer, sharded_state
from fastpeft.training.across_processes import STATE_FOLDER
from fastpeft.training.sharded_state import is_state, load_state, save_state
from fastpeft.training.trainer import last_checkpoint
from tests.tiny_models import small_llama
from tests.tolerance import assert_bits_equal


def stepped(seed: int, kind=torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = kind(model[1].parameters(), lr=0.1 * seed)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_a_state_is_read_as_it_was_written(tmp_path, kind):
    """Trained parameters, whatever an optimizer keeps, and its options, in the place of an older state."""
    save_state(tmp_path / "state", *stepped(3, kind))
    model, optimizer = stepped(1, kind)
    save_state(tmp_path / "state", model, optimizer)
    other, theirs = stepped(2, kind)
    frozen = other[0].weight.clone()
    load_state(tmp_path / "state", other, theirs)
    for name in ("weight", "bias"):
        assert_bits_equal(name, getattr(other[1], name), getattr(model[1], name))
    assert_bits_equal("frozen", other[0].weight, frozen)
    state, wanted = theirs.state_dict(), optimizer.state_dict()
    assert state["param_groups"] == wanted["param_groups"]
    assert set(state["state"]) == set(wanted["state"])
    for number, values in wanted["state"].items():
        for name, value in values.items():
            got = state["state"][number][name]
            if isinstance(value, torch.Tensor):
                assert_bits_equal(name, got, value)
            else:
                assert got == value


def test_a_state_without_its_last_file_is_none(tmp_path):
    save_state(tmp_path, *stepped(1))
    assert is_state(tmp_path)
    (tmp_path / ".metadata").unlink()
    assert not is_state(tmp_path)


def test_a_save_that_fails_over_an_older_state_leaves_none(tmp_path, monkeypatch):
    """Parts of two states under the older one's .metadata would be read as one."""
    save_state(tmp_path / "state", *stepped(1))

    def killed(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(sharded_state, "save", killed)
    with pytest.raises(OSError, match="no space left"):
        save_state(tmp_path / "state", *stepped(2))
    assert not is_state(tmp_path / "state")


def trainer(folder: Path, steps: int) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(small_llama(), LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    rows = [{"input_ids": [5 + row, 6, 7], "labels": [5 + row, 6, 7]} for row in range(8)]
    options = {"use_cpu": True, "report_to": "none", "save_steps": 1, "logging_steps": 1, "learning_rate": 0.01}
    options |= {"per_device_train_batch_size": 2, "max_steps": steps, "lr_scheduler_type": "constant"}
    return Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows)


def losses(of: Trainer) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


def test_a_run_killed_while_it_wrote_its_parts_goes_on_from_the_checkpoint_before(tmp_path):
    """Also when one process then writes another checkpoint into the same folder: its state is the one that counts."""
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    killed = trainer(tmp_path / "killed", 2)
    killed.train()
    first, second = (tmp_path / f"killed/checkpoint-{step}" for step in (1, 2))
    for checkpoint in (first, second):  # as a sharded run has them
        save_state(checkpoint / STATE_FOLDER, killed.model, killed.optimizer)
    assert last_checkpoint(tmp_path / "killed") == second
    (second / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path / "killed") == second
    (second / STATE_FOLDER / ".metadata").unlink()
    assert last_checkpoint(tmp_path / "killed") == first
    (first / STATE_FOLDER / ".metadata").unlink()

    resumed = trainer(tmp_path / "killed", 4)
    resumed.train(resume_from_checkpoint=str(first))
    assert losses(resumed) == losses(whole)
    assert not (second / STATE_FOLDER).exists()
    assert (second / "optimizer.pt").is_file()


def test_one_process_goes_on_from_parts(tmp_path):
    """The adapter, the optimizer and the schedule, without the plain file."""
    whole = trainer(tmp_path / "whole", 4)
    whole.train()
    parts = trainer(tmp_path / "parts", 2)
    parts.train()
    checkpoint = tmp_path / "parts/checkpoint-2"
    save_state(checkpoint / STATE_FOLDER, parts.model, parts.optimizer)
    (checkpoint / "optimizer.pt").unlink()
    resumed = trainer(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "parts")))
    assert losses(resumed) == losses(whole)
    assert not math.isclose(losses(whole)[2], losses(whole)[3])
