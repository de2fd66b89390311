"""LoRA+: the groups are PEFT's, and the Trainer uses them."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as create_in_peft
from transformers import TrainingArguments

import fastpeft
from fastpeft.training.config import TrainConfig
from fastpeft.training.trainer import Trainer
from tests import tiny_models

CONFIGS = {
    "linear": {"target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]},
}


def groups(library, create, config, **options):
    wrapped = library.get_peft_model(tiny_models.small_llama(), library.LoraConfig(r=2, **config))
    names = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    optimizer = create(wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, eps=1e-7, **options)
    return [
        {key: value for key, value in group.items() if key != "params"}
        | {"names": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("options", [{}, {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 2e-5}], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_groups_are_peft_s(config, options):
    ours = groups(fastpeft, fastpeft.create_loraplus_optimizer, config, **options)
    assert ours == groups(peft, create_in_peft, config, **options)
    assert sum(len(group["names"]) for group in ours) > 0


@pytest.mark.parametrize("name", ["lr", "loraplus_lr_ratio", "loraplus_lr_embedding"])
def test_a_rate_that_is_not_positive_is_named(name):
    rates = {"lr": 1e-3, "loraplus_lr_ratio": 4.0, name: -1.0}
    with pytest.raises(ValueError, match=f"expected {name} above 0, got -1.0"):
        fastpeft.create_loraplus_optimizer(tiny_models.trained(), torch.optim.SGD, **rates)


def test_nothing_to_train_is_said():
    with pytest.raises(ValueError, match="trainable"):
        fastpeft.create_loraplus_optimizer(
            tiny_models.small_llama().requires_grad_(False), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2.0
        )


def test_the_trainer_uses_it(tmp_path):
    """Every group falls by the same schedule from its own rate."""
    config = TrainConfig(model="m", data="d", output_dir=str(tmp_path), loraplus_lr_ratio=8.0)
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-3, weight_decay=0.25, use_cpu=True, report_to="none", warmup_steps=0
    )
    trainer = Trainer(tiny_models.trained(), arguments, loraplus=config.loraplus())
    trainer.create_optimizer_and_scheduler(10)
    found = [
        (group["initial_lr"], group["weight_decay"], len(group["params"])) for group in trainer.optimizer.param_groups
    ]
    assert found == [(1e-3, 0.25, 2), (1e-6, 0.25, 0), (8e-3, 0.25, 2), (8e-3, 0.0, 0)]
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [5e-4, 5e-7, 4e-3, 4e-3]
    assert config.loraplus() == {"loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 1e-6}


def test_without_a_ratio_nothing_is_different(tmp_path):
    assert TrainConfig(model="m", data="d", output_dir="o").loraplus() is None
    with pytest.raises(ValueError, match="loraplus_lr_ratio"):
        TrainConfig(model="m", data="d", output_dir="o", loraplus_lr_ratio=0.0)
