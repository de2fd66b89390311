"""Loading adapters beside others, over others, frozen or for training."""

import pytest
import torch
from safetensors.torch import load_file

from fastpeft import LoraConfig, PeftModel, get_peft_model
from fastpeft.checkpoint import TENSORS_NAME
from tests import tiny_models
from tests.tiny_models import bits, edit, fill, flags, logits, loss, small_llama, trained
from tests.tolerance import assert_bits_equal


@pytest.fixture
def saved(tmp_path):
    """The folder of an adapter of small_llama."""
    torch.manual_seed(0)
    trained().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_loaded_for_inference_or_for_training(saved):
    frozen = PeftModel.from_pretrained(small_llama().train(), saved)
    assert not any(flags(frozen).values())
    assert not frozen.training
    assert frozen.peft_config["default"].inference_mode is True
    going_on = PeftModel.from_pretrained(small_llama().train(), saved, is_trainable=True)
    assert going_on.training
    assert all(on is ("lora_" in name) for name, on in flags(going_on).items())
    assert going_on.peft_config["default"].inference_mode is False


def test_loading_a_second_adapter_leaves_the_first_in_training(saved):
    """Loading a frozen reference beside the adapter in training froze that one too: nothing was trained any more."""
    wrapped = PeftModel.from_pretrained(small_llama(), saved, is_trainable=True)
    before = flags(wrapped)
    y = logits(wrapped)
    wrapped.load_adapter(saved, "reference")
    assert wrapped.active_adapters == ["default"]
    assert {name: on for name, on in flags(wrapped).items() if ".reference." not in name} == before
    assert not any(on for name, on in flags(wrapped).items() if ".reference." in name)
    assert_bits_equal("default still", logits(wrapped), y)
    wrapped.set_adapter("reference", inference_mode=True)
    assert_bits_equal("reference", logits(wrapped), y)


def test_loading_a_second_adapter_with_biases_does_not_touch_the_first(tmp_path):
    model = tiny_models.bert().eval()
    base = bits(model)
    wrapped = trained(model, target_modules=["query"], bias="all")
    wrapped.save_pretrained(tmp_path)
    with_biases = logits(wrapped)
    model = wrapped.unload()
    for name, tensor in bits(model).items():
        assert_bits_equal(name, tensor, base[name])
    first = get_peft_model(model, LoraConfig(target_modules=["value"], init_lora_weights=False), "first").eval()
    y = logits(first)
    first.load_adapter(tmp_path, "second")
    assert_bits_equal("first", logits(first), y)
    first.set_adapter("second")
    assert_bits_equal("second", logits(first), with_biases)


def test_loading_over_an_adapter_that_exists(saved):
    """What a trainer does with its best checkpoint: the values come back, into the same parameters."""
    wrapped = PeftModel.from_pretrained(small_llama(), saved, is_trainable=True)
    y, parameters = logits(wrapped), {name: id(p) for name, p in wrapped.named_parameters()}
    fill(wrapped, seed=7)
    wrapped.load_adapter(saved, "default", is_trainable=True)
    assert_bits_equal("logits", logits(wrapped), y)
    assert {name: id(p) for name, p in wrapped.named_parameters()} == parameters
    assert any(flags(wrapped).values())


def test_loading_another_kind_over_an_adapter_is_refused(saved):
    wrapped = trained(r=2, use_rslora=True)
    before = bits(wrapped)
    with pytest.raises(ValueError, match=r"differs from the loaded 'default' in \['use_rslora'\]"):
        wrapped.load_adapter(saved, "default")
    for name, tensor in bits(wrapped).items():
        assert_bits_equal(name, tensor, before[name])


def test_a_half_precision_file_is_loaded_into_float32(saved):
    edit(saved, lambda tensors: tensors.update({k: t.to(torch.bfloat16) for k, t in tensors.items()}))
    loaded = PeftModel.from_pretrained(small_llama(), saved)
    file = load_file(saved / TENSORS_NAME)
    for key, tensor in loaded.base_model.adapter_tensors("default").items():
        assert_bits_equal(key, tensor.detach(), file[key].float())


def test_a_model_that_recomputes_activations_trains_what_is_loaded(saved):
    """Reentrant checkpointing needs a gradient at the inputs; a model whose adapter is refused gets no hook for it."""
    model = small_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    hooks = list(model.get_input_embeddings()._forward_hooks)
    with pytest.raises(FileNotFoundError):
        PeftModel.from_pretrained(model, saved / "absent")
    assert list(model.get_input_embeddings()._forward_hooks) == hooks
    wrapped = PeftModel.from_pretrained(model, saved, is_trainable=True).train()
    loss(wrapped).backward()
    assert all(bool(p.grad.any()) for p in wrapped.parameters() if p.requires_grad)
