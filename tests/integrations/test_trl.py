"""TRL's SFTTrainer trains an accelerated model, whichever of the two comes first, as it trains the untouched one.

TRL puts a forward of its own on the model, with a fused head that also gives it entropy and accuracy, so the part "loss" does not
act there; every other part does, and the report says which.
"""

import datasets
import peft
import pytest
import torch
import trl

import fastpeft
from fastpeft.integrations.acceleration.peft_lora import FastLora
from tests import tiny_models
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close
from tests.training import tiny

STEPS = 3


class Losses(trl.trainer.sft_trainer.TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


def trainer_of(model, folder):
    ids = tiny_models.token_ids(4, 12)
    rows = [{"input_ids": row.tolist(), "labels": [-100] * 5 + row[5:].tolist()} for row in ids]
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=0.05,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_alpha=8)
    torch.manual_seed(1)
    return trl.SFTTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), peft_config=config,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip


def train(trainer):
    losses = Losses()
    trainer.add_callback(losses)
    trainer.train()
    assert len(losses.values) == STEPS
    return torch.tensor(losses.values)


def base():
    torch.manual_seed(0)
    return tiny_models.llama()


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    trainer = trainer_of(base(), tmp_path_factory.mktemp("untouched"))
    return train(trainer), trainer.model


@pytest.mark.parametrize("first", ["accelerate", "trl"])
def test_sft_trainer(first, untouched, tmp_path):
    expected, own = untouched
    model = base()
    if first == "accelerate":
        ledger = fastpeft.accelerate(model)
        trainer = trainer_of(model, tmp_path)
    else:
        trainer = trainer_of(model, tmp_path)
        ledger = fastpeft.accelerate(trainer.model)
    assert_close("losses", train(trainer), expected, OTHER_ORDER_OF_SUMS)
    layers = [module for module in trainer.model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 21
    assert all(isinstance(layer, FastLora) for layer in layers)
    assert not ledger.fallbacks
    summary = ledger.summary()
    assert f"{len(layers)} of {len(layers)} replaced" in summary
    if first == "accelerate":
        assert "trl.trainer.utils has put another forward on it since" in summary
    else:
        assert "its forward was replaced on the instance by other code" in summary
    trainer.model.save_pretrained(tmp_path / "adapter")
    fastpeft.restore(trainer.model)
    assert not any(isinstance(module, FastLora) for module in trainer.model.modules())
    plain = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    ids = tiny_models.token_ids(2, 9)
    with torch.no_grad():
        got, again, reference = (m.eval()(ids).logits for m in (plain, trainer.model, own))
    assert_bits_equal("logits", got, again)
    assert_close("logits", got, reference, GRADIENTS_THROUGH_A_MODEL)
