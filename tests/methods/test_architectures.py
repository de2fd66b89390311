"""Default targets of every architecture: each method finds its modules there, and one step trains them alone."""

import pytest
import torch

from fastpeft import get_peft_model
from fastpeft.methods import METHODS
from fastpeft.methods.targeted import TargetedConfig
from fastpeft.methods.targets import DEFAULT_TARGETS
from tests.architectures import ARCHITECTURES, loss, made, task_type

OPTIONS = {"ADALORA": {"total_step": 100}, "BITFIT": {"train_layernorm": True}}
"""What a method needs beside its defaults, by peft_type. Llama and its like have no bias for BitFit to train."""
CASES = [
    (method, kind)
    for method, config_class in METHODS.items()
    if issubclass(config_class, TargetedConfig)
    for kind in ARCHITECTURES
    if kind in config_class(**OPTIONS.get(method, {})).default_targets
]


def test_every_architecture_has_default_targets():
    assert set(ARCHITECTURES) <= set(DEFAULT_TARGETS)
    assert len(ARCHITECTURES) >= 18
    assert {method for method, _ in CASES} >= {"LORA"}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_model_is_what_it_is_called(kind):
    assert made(kind).config.model_type == kind


@pytest.mark.parametrize(("method", "kind"), CASES, ids=lambda value: value)
def test_one_step_on_the_default_targets_moves_the_adapter_and_nothing_else(method, kind):
    base = made(kind)
    task = task_type(base)
    model = get_peft_model(base, METHODS[method](task_type=task, **OPTIONS.get(method, {})))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    value = loss(model, task)
    value.backward()
    optimizer.step()
    assert torch.isfinite(value)
    assert all(torch.isfinite(p).all() for p in trained.values())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= set(trained)
    wrapped = {path for path, _ in model.base_model.layers()} or {""}
    missed = {path for path in wrapped if not any(path in name for name in moved)}
    assert not missed, f"wrapped, and not trained by a step: {sorted(missed)}"


def test_of_a_model_that_sees_the_text_model_alone_is_adapted(tmp_path):
    """Its vision tower has projections of the same names; the saved config names the text model's too."""
    model = get_peft_model(made("gemma3"), METHODS["LORA"]())
    paths = [path for path, _ in model.base_model.layers()]
    assert paths
    assert all("language_model" in path for path in paths)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(made("gemma3"), tmp_path)
    assert [path for path, _ in again.base_model.layers()] == paths
