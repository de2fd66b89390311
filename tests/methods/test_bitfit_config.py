"""BitFit: which biases are trained, several adapters on the same biases, models without any, what goes into files."""

import copy

import pytest
from safetensors.torch import load_file
from torch import nn

import fastpeft
from fastpeft import BitFitConfig, LoraConfig, NoTargetError, get_peft_model
from fastpeft.checkpoint import TENSORS_NAME
from tests import tiny_models
from tests.tiny_models import bits, fill, flags, logits, token_ids
from tests.tolerance import assert_bits_equal

PREFIX = "base_model.model."


def trained(wrapped) -> set[str]:
    return {key.removeprefix(PREFIX) for key, on in flags(wrapped).items() if on}


def test_every_bias_is_trained_and_nothing_else():
    model = tiny_models.bert()
    expected = {key for key, _ in model.named_parameters() if key.endswith("bias")}
    assert trained(get_peft_model(model, BitFitConfig())) == expected


def test_named_modules_patterns_and_exclusions():
    chosen = trained(get_peft_model(tiny_models.bert(), BitFitConfig(target_modules=["query", "intermediate.dense"])))
    assert {key.rpartition(".bias")[0].rpartition(".")[2] for key in chosen} == {"query", "dense"}
    assert len(chosen) == 4
    chosen = trained(get_peft_model(tiny_models.bert(), BitFitConfig(target_modules=r".*layer\.1\.attention.*")))
    assert chosen
    assert all("layer.1.attention" in key for key in chosen)
    chosen = trained(get_peft_model(tiny_models.bert(), BitFitConfig(exclude_modules=["LayerNorm", "classifier"])))
    assert not any("LayerNorm" in key or "classifier" in key for key in chosen)
    linear = trained(get_peft_model(tiny_models.gpt2(), BitFitConfig(target_modules="all-linear")))
    assert linear
    assert not any(".ln_" in key for key in linear)


def test_train_layernorm_adds_the_norms_weights():
    wrapped = get_peft_model(tiny_models.llama(), BitFitConfig(train_layernorm=True))
    assert trained(wrapped) == {key for key, _ in tiny_models.llama().named_parameters() if "norm" in key}
    both = trained(get_peft_model(tiny_models.gpt2(), BitFitConfig(train_layernorm=True)))
    assert "transformer.h.0.ln_1.weight" in both
    assert "transformer.h.0.attn.c_attn.bias" in both
    assert "transformer.h.0.attn.c_attn.weight" not in both


REFUSED = {
    "no_bias": (
        {},
        r"expected biases to train, got none in the model; train_layernorm=True trains the norms \['input_l",
    ),
    "none_here": ({"target_modules": ["q_proj"]}, r"got none in target_modules=\['q_proj'\]"),
    "no_such_module": ({"target_modules": ["query"]}, r"no module is named \['query'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_without_what_is_asked_for_is_refused_before_it_changes(case):
    options, said = REFUSED[case]
    model = tiny_models.llama()
    before, on = bits(model), flags(model)
    with pytest.raises(NoTargetError, match=said):
        get_peft_model(model, BitFitConfig(**options))
    assert flags(model) == on
    for key, tensor in bits(model).items():
        assert_bits_equal(key, tensor, before[key])


def test_the_file_has_the_biases_by_their_plain_names_and_the_head(tmp_path):
    wrapped = get_peft_model(tiny_models.bert(), BitFitConfig(task_type="SEQ_CLS", target_modules=["query"]))
    wrapped.save_pretrained(tmp_path)
    layers = {f"{PREFIX}bert.encoder.layer.{i}.attention.self.query.bias" for i in range(2)}
    assert set(load_file(tmp_path / TENSORS_NAME)) == layers | {
        PREFIX + "classifier.weight",
        PREFIX + "classifier.bias",
    }


def test_merging_for_good_keeps_the_trained_biases():
    wrapped = get_peft_model(tiny_models.bert().eval(), BitFitConfig())
    fill(wrapped)
    y = logits(wrapped)
    plain = wrapped.merge_and_unload()
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert_bits_equal("logits", logits(plain), y)


def test_two_adapters_on_the_same_biases_are_switched(tmp_path):
    """The second starts from the base's values although the first is in the model when it is added."""
    base = tiny_models.bert().eval()
    plain = logits(base)
    wrapped = get_peft_model(base, BitFitConfig(), "a")
    fill(wrapped)
    a = logits(wrapped)
    wrapped.add_adapter("b", BitFitConfig())
    assert_bits_equal("a is still in", logits(wrapped), a)
    wrapped.set_adapter("b")
    assert_bits_equal("b starts as the base", logits(wrapped), plain)
    assert len(trained(wrapped)) == len(trained(get_peft_model(tiny_models.bert(), BitFitConfig())))
    fill(wrapped, seed=2)
    b = logits(wrapped)
    for name, y in (("a", a), ("b", b), ("a", a)):
        wrapped.set_adapter(name)
        assert trained(wrapped)
        assert_bits_equal(name, logits(wrapped), y)
        with wrapped.disable_adapter():
            assert_bits_equal("off", logits(wrapped), plain)
        assert_bits_equal("a copy", logits(copy.deepcopy(wrapped)), y)
    wrapped.merge_adapter(["b"])
    assert_bits_equal("b merged", logits(wrapped), b)
    wrapped.unmerge_adapter()
    assert_bits_equal("a active", logits(wrapped), a)
    wrapped.save_pretrained(tmp_path)
    loaded = fastpeft.PeftModel.from_pretrained(copy.deepcopy(wrapped).unload(), tmp_path / "b", "b")
    assert_bits_equal("b loaded", logits(loaded), b)
    wrapped.delete_adapter("a")
    assert_bits_equal("b alone", logits(wrapped), b)
    assert_bits_equal("unloaded", logits(wrapped.unload()), plain)


def test_two_on_the_same_biases_cannot_act_at_once():
    wrapped = get_peft_model(tiny_models.bert().eval(), BitFitConfig(target_modules=["query"]), "a")
    wrapped.add_adapter("b", BitFitConfig(target_modules=["query", "key"]))
    wrapped.add_adapter("c", BitFitConfig(target_modules=["value"]))
    before = logits(wrapped)
    for change in (
        wrapped.set_adapter,
        wrapped.merge_adapter,
        lambda names: wrapped.merge_and_unload(adapter_names=names),
    ):
        with pytest.raises(ValueError, match=r"one of \['a', 'b'\], which train the same parameters of the base"):
            change(["a", "b"])
    assert wrapped.active_adapters == ["a"]
    assert_bits_equal("logits", logits(wrapped), before)
    wrapped.set_adapter(["b", "c"])
    assert {key.split(".")[-2] for key in trained(wrapped)} == {"query", "key", "value"}


def test_beside_lora():
    """LoRA acts as it does, in either order; LoRA with biases of its own on the same ones is refused."""
    wrapped = get_peft_model(tiny_models.bert().eval(), LoraConfig(r=2), "lora")
    fill(wrapped)
    lora = logits(wrapped)
    wrapped.add_adapter("bitfit", BitFitConfig())
    assert_bits_equal("lora", logits(wrapped), lora)
    wrapped.set_adapter("bitfit")
    fill(wrapped, seed=3)
    assert f"{PREFIX}bert.encoder.layer.0.attention.self.query.bias" in wrapped.base_model.adapter_tensors("bitfit")
    wrapped.set_adapter("lora")
    assert_bits_equal("lora again", logits(wrapped), lora)
    with pytest.raises(ValueError, match=r"bias='none' beside \['bitfit'\]"):
        wrapped.add_adapter("other", LoraConfig(r=2, bias="lora_only"))
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter first"):
        wrapped.add_adapter("late", BitFitConfig())


def test_items_of_a_batch_cannot_have_biases_of_their_own():
    wrapped = get_peft_model(tiny_models.gpt2().eval(), BitFitConfig(), "a")
    with pytest.raises((ValueError, NotImplementedError), match="a"):
        wrapped(input_ids=token_ids(), adapter_names=["a", "__base__"])


def test_attention_modules_own_biases():
    """torch's MultiheadAttention holds in_proj_bias itself."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    assert trained(get_peft_model(Net(), BitFitConfig())) == {"attention.in_proj_bias", "attention.out_proj.bias"}
