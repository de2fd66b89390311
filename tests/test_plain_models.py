"""PEFT's functions for models and state: what they give equals what PEFT gives for the same model."""

import copy

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

import fastpeft
from fastpeft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from fastpeft.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from tests import tiny_models
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close

OPTIONS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


def pair():
    """The same small Llama here and under PEFT, with the same adapter in both."""
    base = tiny_models.small_llama()
    other = tiny_models.small_llama()
    other.load_state_dict(base.state_dict())
    ours, theirs = get_peft_model(base, LoraConfig(**OPTIONS)), peft.get_peft_model(other, peft.LoraConfig(**OPTIONS))
    tiny_models.fill(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def test_state_dicts_are_peft_s_and_go_both_ways():
    ours, theirs = pair()
    mine, other = get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert set(mine) == set(other)
    for name, tensor in other.items():
        assert_bits_equal(name, mine[name], tensor)
    fresh = PeftModel(tiny_models.small_llama(), LoraConfig(**OPTIONS))
    result = set_peft_model_state_dict(fresh, other)
    assert result.missing_keys == result.unexpected_keys == []
    for name, tensor in get_peft_model_state_dict(fresh).items():
        assert_bits_equal(name, tensor, other[name])
    assert not any(tensor.requires_grad for tensor in mine.values())


def test_what_does_not_fit_is_listed_or_refused():
    ours, _ = pair()
    tensors = get_peft_model_state_dict(ours)
    first, second, *_ = tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    result = set_peft_model_state_dict(ours, {first: tensors[first] + 1, "other": torch.zeros(1)})
    assert second in result.missing_keys
    assert result.unexpected_keys == ["other"]
    assert_bits_equal(first, get_peft_model_state_dict(ours)[first], before[first] + 1)
    with pytest.raises(ValueError, match=rf"1 of another shape: {first} expected \(2, 32\), got \(1, 32\)"):
        set_peft_model_state_dict(ours, {first: before[first][:1], second: before[second] * 0})
    assert_bits_equal(second, get_peft_model_state_dict(ours)[second], before[second])
    with pytest.raises(ValueError, match="got \\['absent'\\]"):
        get_peft_model_state_dict(ours, "absent")
    with pytest.raises(TypeError, match="LlamaForCausalLM without adapters"):
        get_peft_model_state_dict(tiny_models.small_llama())


def test_injecting_changes_the_model_itself():
    ours, theirs = pair()
    base = tiny_models.small_llama()
    base.load_state_dict(plain_state(ours))
    model = inject_adapter_in_model(LoraConfig(**OPTIONS), base)
    assert model is base
    assert not any("_fastpeft" in name for name, _ in model.named_modules())
    injected = peft.inject_adapter_in_model(peft.LoraConfig(**OPTIONS), tiny_models.small_llama())
    mine, other = get_peft_model_state_dict(model), peft.get_peft_model_state_dict(injected)
    assert set(mine) == set(other)
    prefix = "base_model.model."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in peft.get_peft_model_state_dict(theirs).items()}
    assert set_peft_model_state_dict(model, tensors).missing_keys == []
    assert_close("logits", tiny_models.logits(model.eval()), tiny_models.logits(theirs), LOGITS_EQUAL_TO_PEFT)
    tiny_models.loss(model).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad} != set()
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj"]), model, "second")
    assert get_model_status(model).available_adapters == ["default", "second"]
    assert get_model_status(model).active_adapters == ["second"]


def plain_state(model) -> dict[str, torch.Tensor]:
    """The base model's own state, by its own names."""
    state = model.get_base_model().state_dict()
    own = {name: value for name, value in state.items() if "lora_" not in name and "modules_to_save" not in name}
    return {name.replace(".base_layer", "").replace(".original_module", ""): value for name, value in own.items()}


def test_a_frozen_injection_and_a_copy():
    model = inject_adapter_in_model(LoraConfig(r=2, inference_mode=True), tiny_models.small_llama())
    assert not any(p.requires_grad for p in model.parameters())
    twin = copy.deepcopy(model)
    tensors = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(twin).items()}
    set_peft_model_state_dict(twin, tensors)
    first = next(iter(tensors))
    assert not torch.equal(get_peft_model_state_dict(model)[first], get_peft_model_state_dict(twin)[first])


# -- status -------------------------------------------------------------------------------------------------------------


def rows(model, library) -> dict[str, dict]:
    found = {}
    for row in library.get_layer_status(model):
        values = vars(row) | {
            "module_type": None,
            "requires_grad": dict(row.requires_grad),
            "devices": dict(row.devices),
        }
        values["available_adapters"] = sorted(row.available_adapters)
        values.pop("quantization_backend", None)  # always None here
        found[row.name] = values
    return found


def summary(model, library) -> dict:
    status = dict(vars(library.get_model_status(model)))
    status.pop("quantization_backend", None)
    kinds = {name: str(kind).split(".")[-1] for name, kind in status["peft_types"].items()}
    return status | {"adapter_model_type": None, "peft_types": kinds}


@pytest.mark.parametrize(
    "change",
    [
        lambda model, library: None,
        lambda model, library: model.add_adapter("second", library.LoraConfig(r=3, target_modules=["q_proj"])),
        lambda model, library: model.merge_adapter(),
    ],
    ids=["fresh", "two", "merged"],
)
def test_status_is_peft_s(change):
    """But for the names of classes, which are each library's own."""
    found = []
    for library, base in ((fastpeft, tiny_models.small_llama()), (peft, tiny_models.small_llama())):
        model = library.get_peft_model(
            base, library.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
        change(model, library)
        found.append((rows(model, library), summary(model, library)))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]


def test_adapters_that_are_off_stay_trainable():
    """PEFT freezes them meanwhile."""
    model = get_peft_model(tiny_models.small_llama(), LoraConfig(r=2))
    with model.disable_adapter():
        status = model.get_model_status()
        assert (status.enabled, status.requires_grad) == (False, {"default": True})
    assert model.get_model_status().enabled is True


def test_status_of_what_is_irregular():
    model = get_peft_model(tiny_models.small_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    layers = dict(model.base_model.layers())
    first, second = layers.values()
    first.lora_A["default"].weight.requires_grad_(False)
    second.enable_adapters(False)
    status = model.get_model_status()
    assert (status.enabled, status.requires_grad) == ("irregular", {"default": "irregular"})
    second.enable_adapters(True)
    first.merge()
    assert model.get_model_status().merged_adapters == "irregular"
    assert [row.merged_adapters for row in model.get_layer_status()] == [["default"], []]
    assert get_layer_status(model) == model.get_layer_status()


# -- classes by task, counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
def test_the_class_says_the_task(task, tmp_path):
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    assert kind.__name__ == peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
    model = get_peft_model(tiny_models.small_llama(), LoraConfig(r=2, task_type=task))
    assert type(model) is kind
    model.save_pretrained(tmp_path)
    assert type(PeftModel.from_pretrained(tiny_models.small_llama(), tmp_path)) is kind
    assert type(get_peft_model(tiny_models.small_llama(), LoraConfig(r=2))) is PeftModel


def test_parameter_counts():
    model = get_peft_model(
        tiny_models.tied_llama(), LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["norm"])
    )
    counts = model.parameter_counts()
    trainable, total = model.get_nb_trainable_parameters()
    assert (counts["trainable"], counts["total"]) == (trainable, total)
    assert counts["percent"] == 100 * trainable / total
    assert sum(counts["by_module"].values()) == trainable
    assert counts["by_module"]["model.layers.0.self_attn.q_proj"] == 2 * 64 + 64 * 2
    assert counts["by_module"]["model.norm"] == 64
    assert model.parameter_counts() == counts


# -- Auto ---------------------------------------------------------------------------------------------------------------


def test_auto_classes_find_the_base_model(tmp_path):
    tiny_models.small_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).eval()
    tiny_models.fill(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = tiny_models.logits(model)
    for auto in (fastpeft.AutoPeftModelForCausalLM, fastpeft.AutoPeftModel):
        loaded = auto.from_pretrained(tmp_path / "adapter")
        assert type(loaded) is fastpeft.PeftModelForCausalLM
        assert_bits_equal("logits", tiny_models.logits(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    half = fastpeft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", is_trainable=True, dtype=torch.bfloat16
    )
    assert half.get_base_model().dtype == torch.bfloat16
    assert any(p.requires_grad for p in half.parameters())
    with pytest.raises(ValueError, match="expected an adapter with task_type SEQ_CLS, got CAUSAL_LM"):
        fastpeft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(TypeError, match="from_pretrained"):
        fastpeft.AutoPeftModel()
    get_peft_model(tiny_models.small_llama(), LoraConfig(r=2)).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="does not name its base model"):
        fastpeft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nameless")
