"""A whole schedule of AdaLoRA beside PEFT's: the same masks, the same E, the same losses, step by step; and torch.compile."""

import peft
import pytest
import torch

import fastpeft
from tests.every_method.building import base
from tests.tiny_models import inputs, token_ids
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, assert_bits_equal, assert_close

STEPS = 26
SCHEDULES = {
    "every_step": {"tinit": 0, "tfinal": 0, "deltaT": 1},
    "three_phases": {"tinit": 4, "tfinal": 8, "deltaT": 3},
}


def trainer(library, schedule, model="llama", **options):
    torch.manual_seed(0)
    settings = {"task_type": "CAUSAL_LM", "init_r": 6, "target_r": 3, "lora_alpha": 32, "total_step": STEPS - 1}
    wrapped = library.get_peft_model(
        base(model), library.AdaLoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **settings | schedule)
    )
    return wrapped.train()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_is_peft_s(schedule):
    """The models are float32: over other dtypes PEFT 0.21 lets the optimizer move `ranknum`, which its files do not have."""
    theirs, ours = (trainer(library, schedule) for library in (peft, fastpeft))
    values = dict(theirs.named_parameters())
    trained = [(key, p) for key, p in ours.named_parameters() if p.requires_grad]
    for key, parameter in trained:
        parameter.data.copy_(values[key])
    pairs = [
        (model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
        for model in (theirs, ours)
    ]
    counts = []
    for step in range(1, STEPS + 1):
        losses = []
        for model, optimizer in pairs:
            loss = model(**inputs(model), labels=token_ids()).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert_close(f"loss {step}", losses[1], losses[0], GRADIENTS_THROUGH_A_MODEL)
        pattern = theirs.peft_config["default"].rank_pattern or {}
        expected = {key.replace(".default", ""): row for key, row in pattern.items()}
        assert (ours.peft_config["default"].rank_pattern or {}) == expected, step
        for key, parameter in trained:
            if "lora_E" in key:
                assert_close(f"{key} {step}", parameter, values[key], GRADIENTS_THROUGH_A_MODEL)
        counts.append(sum(map(sum, expected.values())))
    assert counts[-1] == 9 * 3
    assert len(set(counts)) > 4, counts


def test_the_penalty_is_peft_s():
    theirs, ours = (trainer(library, SCHEDULES["three_phases"]) for library in (peft, fastpeft))
    values = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values[key])
    for model in (theirs, ours):
        loss = model(**inputs(model), labels=token_ids()).loss
        model.zero_grad()
        (loss - model.base_model.model(**inputs(model), labels=token_ids()).loss).backward()  # the penalty alone
    for key, parameter in ours.named_parameters():
        if parameter.grad is not None and "lora_E" not in key:
            assert_close(key, parameter.grad, values[key].grad, GRADIENTS_THROUGH_A_MODEL)


def test_masked_triples_stay_out_after_the_last_allocation():
    ours = trainer(fastpeft, {"tinit": 1, "tfinal": 20, "deltaT": 1})
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    masks = []
    for step in range(1, 12):
        ours(**inputs(ours), labels=token_ids()).loss.backward()
        optimizer.step()
        ours.update_and_allocate(step)
        optimizer.zero_grad()
        masks.append(
            torch.cat([layer.lora_E["default"].detach().flatten() != 0 for _, layer in ours.base_model.layers()])
        )
    for mask in masks[5:]:
        assert_bits_equal("mask", mask, masks[4])  # total_step - tfinal = 5
