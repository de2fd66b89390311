"""LoRA over parameters (target_parameters): PEFT's function, gradients and files, on models with experts and on matrices."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from fastpeft import LoraConfig, NoTargetError, get_peft_model
from fastpeft.checkpoint import TENSORS_NAME
from tests import tiny_models
from tests.tiny_models import bits, logits
from tests.tolerance import (
    GRADIENTS_THROUGH_A_MODEL,
    LOGITS_EQUAL_TO_PEFT,
    MERGED_EQUALS_UNMERGED,
    assert_bits_equal,
    assert_close,
)

EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES = {
    "mixtral": (tiny_models.mixtral, EXPERTS),
    "qwen3_moe": (tiny_models.qwen3_moe, EXPERTS),
    "gpt_oss": (tiny_models.gpt_oss, EXPERTS),
    "one": (tiny_models.mixtral, {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "reversed": (
        tiny_models.mixtral,
        {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    ),
    "router": (tiny_models.mixtral, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "linear": (tiny_models.small_llama, {"target_modules": [], "target_parameters": ["q_proj.weight", "embed_tokens.weight"]}),
    "beside_modules": (tiny_models.mixtral, EXPERTS | {"target_modules": ["q_proj"]}),
    "defaults": (tiny_models.mixtral, EXPERTS | {"target_modules": None}),
    "patterns": (
        tiny_models.mixtral,
        EXPERTS | {"use_rslora": True, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"gate_up_proj": 3}},
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def base(name, dtype=torch.float32):
    torch.manual_seed(0)
    return CASES[name][0]().to(dtype).eval()


def adapted(name, library=fastpeft, model=None, **options):
    torch.manual_seed(1)
    config = library.LoraConfig(**{"r": 2, "lora_alpha": 5} | CASES[name][1] | options)
    return library.get_peft_model(base(name) if model is None else model, config).eval()


def moved(wrapped, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key in sorted(key for key, parameter in wrapped.named_parameters() if parameter.requires_grad):
            parameter = wrapped.get_parameter(key)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrapped


@every_case
def test_a_fresh_adapter_changes_nothing(name):
    assert_close("logits", logits(adapted(name)), logits(base(name)), LOGITS_EQUAL_TO_PEFT)


@every_case
@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
def test_files_go_both_ways(name, direction, tmp_path):
    writer, reader = (peft, fastpeft) if direction == "from_peft" else (fastpeft, peft)
    wrapped = moved(adapted(name, writer))
    wrapped.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(base(name), tmp_path).eval()
    expected = logits(wrapped)
    assert (expected - logits(base(name))).abs().max() > 1e3 * LOGITS_EQUAL_TO_PEFT
    assert_close("logits", logits(loaded), expected, LOGITS_EQUAL_TO_PEFT)


@every_case
def test_the_same_names_and_shapes_on_disk(name, tmp_path):
    shapes = []
    for library in (fastpeft, peft):
        adapted(name, library).save_pretrained(tmp_path / library.__name__)
        tensors = load_file(tmp_path / library.__name__ / TENSORS_NAME)
        # PEFT adds the whole embedding where one is named
        shapes.append({key: tensor.shape for key, tensor in tensors.items() if "lora_" in key})
    assert shapes[0] == shapes[1]
    assert shapes[0]


@every_case
def test_gradients_are_peft_s(name, tmp_path):
    """By their names on disk: PEFT nests a wrapper for every parameter, here one holds them all."""
    wrapped = moved(adapted(name, peft))
    wrapped.save_pretrained(tmp_path)
    ours = fastpeft.PeftModel.from_pretrained(base(name), tmp_path, is_trainable=True)
    for model in (ours, wrapped):
        tiny_models.loss(model.train()).backward()
    theirs = {
        key.replace(".default", ""): parameter.grad
        for key, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    found = {key: tensor.grad for key, tensor in ours.base_model.adapter_tensors("default").items()}
    assert found.keys() == theirs.keys()
    for key, gradient in found.items():
        assert_close(key, gradient, theirs[key], GRADIENTS_THROUGH_A_MODEL)


@every_case
def test_merging(name):
    wrapped = moved(adapted(name))
    expected, before = logits(wrapped), bits(wrapped)
    wrapped.merge_adapter(safe_merge=True)
    assert_close("merged", logits(wrapped), expected, MERGED_EQUALS_UNMERGED)
    with wrapped.disable_adapter():
        assert_bits_equal("disabled", logits(wrapped), logits(base(name)))
    assert_close("merged again", logits(wrapped), expected, MERGED_EQUALS_UNMERGED)
    wrapped.unmerge_adapter()
    for key, tensor in bits(wrapped).items():
        assert_bits_equal(key, tensor, before[key])
    plain = wrapped.merge_and_unload(safe_merge=True)
    assert type(plain) is type(base(name))
    assert bits(plain).keys() == bits(base(name)).keys()
    assert_close("unloaded", logits(plain), expected, MERGED_EQUALS_UNMERGED)


def test_the_update_of_every_expert_is_its_own_product():
    """Against plain loops in float64, for both layouts."""
    for name in ("mixtral", "gpt_oss"):
        wrapped = moved(adapted(name))
        path, layer = next(iter(wrapped.base_model.layers()))
        values = layer._merged_values(["default"])
        for key, merged in values.items():
            held = layer.base_layer.get_parameter(key)
            a, b = (getattr(layer, f"lora_{x}")["default"][key].weight.double() for x in "AB")
            experts = held.shape[0]
            exact = held.double().clone()
            for e in range(experts):
                update = 2.5 * b[:, e::experts] @ a[2 * e : 2 * e + 2]
                exact[e] += update.t() if name == "gpt_oss" else update
            assert_close(f"{path}.{key}", merged.double(), exact, LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    wrapped = moved(adapted("mixtral")).train()
    tiny_models.loss(wrapped).backward()
    expected = {key: p.grad.clone() for key, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tiny_models.loss(wrapped).backward()
    assert expected
    for key, gradient in expected.items():
        assert_close(key, wrapped.get_parameter(key).grad, gradient, GRADIENTS_THROUGH_A_MODEL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_experts_have_float32_adapters(dtype):
    wrapped = moved(adapted("mixtral", model=base("mixtral", dtype)))
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    tiny_models.loss(wrapped.train()).backward()
    assert all(torch.isfinite(p.grad).all() for p in wrapped.parameters() if p.requires_grad)


def test_adapters_are_added_switched_and_deleted():
    wrapped = moved(adapted("mixtral"))
    first = logits(wrapped)
    wrapped.add_adapter("second", LoraConfig(r=3, **CASES["one"][1]))
    wrapped.set_adapter("second")
    moved(wrapped, seed=2)
    second = logits(wrapped)
    wrapped.set_adapter(["default", "second"])
    both = logits(wrapped)
    wrapped.merge_adapter()
    assert_close("both merged", logits(wrapped), both, MERGED_EQUALS_UNMERGED)
    wrapped.unmerge_adapter()
    wrapped.set_adapter("default")
    assert_bits_equal("first", logits(wrapped), first)
    assert_bits_equal("a copy", logits(copy.deepcopy(wrapped)), first)
    with fastpeft.rescale_adapter_scale(wrapped, 0.0):
        assert_close("off", logits(wrapped), logits(base("mixtral")), LOGITS_EQUAL_TO_PEFT)
    wrapped.delete_adapter("default")
    assert_bits_equal("second", logits(wrapped), second)
    plain = wrapped.unload()
    assert_bits_equal("base", logits(plain), logits(base("mixtral")))


REFUSED = {
    "unknown": ({"target_parameters": ["experts.nothing"]}, NoTargetError, "experts.gate_up_proj"),
    "twice": ({"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]}, ValueError, "once"),
    "vector": ({"target_modules": [], "target_parameters": ["norm.weight"]}, ValueError, "2 or 3 dimensions"),
    "start": (EXPERTS | {"init_lora_weights": "pissa"}, ValueError, "pissa"),
}


@pytest.mark.parametrize(("options", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_model_changes(options, error, said):
    model = base("mixtral")
    before = bits(model)
    with pytest.raises(error, match=said):
        get_peft_model(model, LoraConfig(**options))
    assert bits(model).keys() == before.keys()


def test_rows_of_several_adapters_are_refused():
    wrapped = adapted("mixtral")
    with pytest.raises(NotImplementedError, match="target_parameters"):
        wrapped(input_ids=tiny_models.token_ids(), adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="target_parameters"):
        wrapped.add_weighted_adapter(["default"], [1.0], "mix")
