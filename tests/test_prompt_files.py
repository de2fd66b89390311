"""Files of prompts that an encoder makes: the prompt for inference, the encoder in the side file for training."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from fastpeft.checkpoint import TENSORS_NAME, TRAINING_NAME
from tests import tiny_models
from tests.tolerance import assert_bits_equal

CONFIGS = {
    "mlp": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=5),
    "lstm": PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=5, encoder_reparameterization_type="LSTM", encoder_dropout=0.5
    ),
    "projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    wrapped = get_peft_model(llama(), CONFIGS[request.param])
    tiny_models.fill(wrapped)
    wrapped.train().save_pretrained(tmp_path)  # in training mode: the saved prompt has no dropout all the same
    assert wrapped.base_model.prompts["default"].training
    return tmp_path


def test_for_inference_only_the_prompt_counts(folder):
    kept = PeftModel.from_pretrained(llama(), folder)
    (folder / TRAINING_NAME).unlink()
    loaded = PeftModel.from_pretrained(llama(), folder)
    prompt = loaded.base_model.prompts["default"]
    assert [name for name, _ in prompt.named_parameters()] == ["embedding.weight"]
    assert_bits_equal("prompt", prompt.embedding.weight, load_file(folder / TENSORS_NAME)["prompt_embeddings"])
    loaded.save_pretrained(folder / "again")
    assert not (folder / "again" / TRAINING_NAME).exists()
    assert_bits_equal("again", load_file(folder / "again" / TENSORS_NAME)["prompt_embeddings"], prompt.embedding.weight)
    assert_bits_equal(
        "with the side file", kept.base_model.prompts["default"].embedding.weight, prompt.embedding.weight
    )


def test_training_needs_the_encoder(folder, tmp_path_factory):
    loaded = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    state = load_file(folder / TRAINING_NAME)
    for name, parameter in loaded.base_model.prompts["default"].named_parameters():
        assert_bits_equal(name, parameter, state[f"prompt_encoder.{name}"])
        assert parameter.requires_grad
    save_file({name: tensor[:1].clone() for name, tensor in state.items()}, folder / TRAINING_NAME)
    _refused(folder, "expected the prompt's encoder with")
    (folder / TRAINING_NAME).unlink()
    _refused(folder, "without the encoder that made it")
    theirs = tmp_path_factory.mktemp("peft")
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=5)
    peft.get_peft_model(llama(), config).save_pretrained(theirs)
    _refused(theirs, "without the encoder that made it")


def llama():
    torch.manual_seed(0)
    return tiny_models.small_llama()


def _refused(folder, match):
    model = llama()
    before = tiny_models.bits(model)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(model, folder, is_trainable=True)
    assert set(tiny_models.bits(model)) == set(before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loading_into_an_adapter_that_has_its_encoder(folder):
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    own = fastpeft.methods.config_from_dict(config | {"inference_mode": False})
    wrapped = get_peft_model(llama(), own).eval()
    reference = PeftModel.from_pretrained(llama(), folder)
    wrapped.load_adapter(folder, "default", is_trainable=True)
    assert wrapped.base_model.prompts["default"].has_encoder()
    assert_bits_equal("with the encoder", tiny_models.logits(wrapped.eval()), tiny_models.logits(reference))
    wrapped.load_adapter(folder, "default")
    assert not wrapped.base_model.prompts["default"].has_encoder()
    assert_bits_equal("without it", tiny_models.logits(wrapped), tiny_models.logits(reference))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "MultitaskPromptTuningConfig"])
def test_training_goes_on_from_pefts_folder_where_nothing_is_lost(kind, tmp_path):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    tiny_models.loss(loaded).backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)
    assert any(p.requires_grad for p in loaded.parameters())


def test_a_heads_name_on_disk(tmp_path):
    wrapped = get_peft_model(tiny_models.bert(), PromptEncoderConfig(num_virtual_tokens=3))
    wrapped.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / TENSORS_NAME)) == {
        "prompt_embeddings",
        "base_model.classifier.weight",
        "base_model.classifier.bias",
    }
