"""LoRALinear(use_dora=True): against PEFT in forward, gradients, files and merged weights; merging, several adapters, bases."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft import LoraConfig, PeftModel, get_peft_model
from fastpeft.checkpoint import TENSORS_NAME
from fastpeft.layers.lora import LoRALinear
from tests import tiny_models
from tests.tiny_models import fill, logits
from tests.tolerance import (
    LOGITS_EQUAL_TO_PEFT,
    MERGED_EQUALS_UNMERGED,
    OTHER_ORDER_OF_SUMS,
    assert_bits_equal,
    assert_close,
)

F32, BF16 = torch.float32, torch.bfloat16
K, N, R = 40, 24, 3
OPTIONS = {"r": 4, "lora_alpha": 12, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = OPTIONS | {"target_modules": ["c_attn", "c_fc"]}
MODELS = {"llama": (tiny_models.llama, OPTIONS), "gpt2": (tiny_models.gpt2, GPT2)}


def scatter(model: nn.Module, seed: int = 1) -> None:
    """Adapters that do something: magnitudes near their initial values, the rest drawn anew."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n}
    fill(model, seed=seed)
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name] * (1 + parameter.data)


def pair(make, options, **more):
    """The same model with the same adapter under fastpeft and under PEFT."""
    base = make()
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**options, **more))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options, **more))
    scatter(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", MODELS)
def test_logits_names_and_gradients_are_peft_s(name):
    ours, theirs = pair(*MODELS[name])
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert_close("logits", logits(ours.eval()), logits(theirs.eval()), LOGITS_EQUAL_TO_PEFT)
    gradients = []
    for model in (ours, theirs):
        model.zero_grad()
        tiny_models.loss(model).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert set(gradients[0]) == set(gradients[1])
    assert any("magnitude" in n for n in gradients[0])
    for parameter, expected in gradients[1].items():
        assert_close(parameter, gradients[0][parameter], expected, OTHER_ORDER_OF_SUMS)
        assert bool(expected.any()), parameter


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_peft_s(name):
    ours, theirs = pair(*MODELS[name])
    expected = logits(ours.eval())
    merged, merged_by_peft = ours.merge_and_unload(), theirs.merge_and_unload()
    for parameter, tensor in merged_by_peft.state_dict().items():
        assert_close(parameter, merged.state_dict()[parameter], tensor, OTHER_ORDER_OF_SUMS)
    assert_close("logits", logits(merged), expected, MERGED_EQUALS_UNMERGED)


@pytest.mark.parametrize("name", MODELS)
def test_files_go_both_ways(name, tmp_path):
    make, options = MODELS[name]
    torch.manual_seed(3)
    base = make().eval()
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()
    scatter(ours)
    ours.save_pretrained(tmp_path / "ours")
    on_disk = load_file(tmp_path / "ours" / TENSORS_NAME)
    assert any(key.endswith(".lora_magnitude_vector") for key in on_disk)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close("read by PEFT", logits(theirs), logits(ours), LOGITS_EQUAL_TO_PEFT)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert_bits_equal("written by PEFT", logits(again), logits(ours))
    assert again.active_peft_config.use_dora
    assert set(load_file(tmp_path / "theirs" / TENSORS_NAME)) == set(on_disk)


def make_layer(kind: str = "linear", dtype=F32, **options) -> LoRALinear:
    base = Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N)
    layer = LoRALinear(base.to(dtype), R, 2 * R, use_dora=True, **options)
    scatter(layer)
    return layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_the_initial_magnitude_leaves_the_sum_as_it_is(kind, init):
    """Whatever A and B start as: m = ||W + s B A||, so the rows keep their lengths."""
    base = Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N)
    layer = LoRALinear(base, R, 2 * R, use_dora=True, init_lora_weights=init)
    with torch.no_grad():
        plain = base.weight.t() if kind == "conv1d" else base.weight
        v = plain + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert_close("m", layer.lora_magnitude_vector["default"].weight.detach(), v.norm(dim=1), OTHER_ORDER_OF_SUMS)
    x = torch.randn(33, K)
    assert_close("y", layer(x).detach(), (x @ v.t() + base.bias).detach(), MERGED_EQUALS_UNMERGED)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merging_and_unmerging(kind):
    layer, x = make_layer(kind).eval(), torch.randn(33, K)
    before, weight = layer(x).detach(), layer.base_layer.weight
    layer.merge(safe_merge=True)
    assert_close("merged", layer(x).detach(), before, MERGED_EQUALS_UNMERGED)
    layer.unmerge()
    assert layer.base_layer.weight is weight
    assert_bits_equal("unmerged", layer(x).detach(), before)


def test_dora_beside_lora():
    """Updates of several adapters add up, whichever kind they are, merged or not."""
    base, x = nn.Linear(K, N), torch.randn(33, K)
    one = LoRALinear(base, R, 2 * R, adapter_name="one", use_dora=True)
    one.absorb(LoRALinear(base, R, R, adapter_name="two"))
    one.absorb(LoRALinear(base, R + 1, R, adapter_name="three", use_dora=True))
    for name in ("one", "two", "three"):
        one.set_adapter(name)
        scatter(one, seed=len(name))
    plain = base(x)
    single = {}
    for name in ("one", "two", "three"):
        one.set_adapter(name)
        single[name] = one(x) - plain
    one.set_adapter(["three", "one", "two"])
    expected = plain + sum(single.values())
    assert_close("sum", one(x).detach(), expected.detach(), MERGED_EQUALS_UNMERGED)
    one.merge()
    assert_close("merged", one(x).detach(), expected.detach(), MERGED_EQUALS_UNMERGED)
    one.delete_adapter("one")
    assert list(one.lora_magnitude_vector) == ["three"]
    assert list(one.adapter_tensors("two")) == ["lora_A.weight", "lora_B.weight"]
    assert list(one.adapter_tensors("three")) == ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]


def test_a_hooked_base_is_honoured():
    layer, x = make_layer(), torch.randn(33, K)
    expected = layer(x) + 1
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    assert_close("y", layer(x).detach(), expected.detach(), MERGED_EQUALS_UNMERGED)


def test_row_squares_follow_the_weight():
    """They are kept between calls: a weight that was loaded, replaced, moved or converted must not be forgotten."""
    layer, x = make_layer(), torch.randn(33, K)
    layer(x)
    assert layer.row_squares() is layer.row_squares()
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)
    fresh = make_layer()
    fresh.load_state_dict(layer.state_dict())
    assert_bits_equal("changed in place", layer(x).detach(), fresh(x).detach())
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 3, requires_grad=False)
    fresh.load_state_dict(layer.state_dict())
    assert_bits_equal("replaced", layer(x).detach(), fresh(x).detach())
    assert layer.to(torch.float64).row_squares().dtype == torch.float64


def test_dropout_is_off_in_eval_and_follows_the_seed():
    layer, x = make_layer(lora_dropout=0.4), torch.randn(33, K)
    torch.manual_seed(2)
    first = layer(x)
    torch.manual_seed(2)
    assert_bits_equal("same seed", layer(x), first)
    without = make_layer()
    without.load_state_dict(layer.state_dict())
    assert not torch.equal(first, without(x))
    assert_bits_equal("eval", layer.eval()(x), without(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy], ids=["copy"])
def test_copies_are_independent(duplicate):
    layer, x = make_layer(), torch.randn(33, K)
    twin = duplicate(layer)
    assert_bits_equal("y", twin(x).detach(), layer(x).detach())
    with torch.no_grad():
        twin.lora_magnitude_vector["default"].weight.mul_(2)
    assert not torch.equal(twin(x), layer(x))


def test_what_has_no_dora_says_so():
    with pytest.raises(ValueError, match="use_dora or lora_bias"):
        LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="use_dora or lora_bias"):
        LoRALinear(nn.Linear(K, N), use_dora=True, lora_bias=True)
    with pytest.raises(NotImplementedError, match="use_dora is for linear modules"):
        get_peft_model(tiny_models.llama(), LoraConfig(use_dora=True, target_modules=["embed_tokens"]))


def test_magnitudes_are_float32_over_a_half_precision_base():
    layer = make_layer(dtype=BF16)
    assert {p.dtype for p in layer.adapter_tensors("default").values()} == {F32}
    y = layer(torch.randn(33, K, dtype=BF16))
    assert y.dtype == BF16
    y.sum().backward()
    assert layer.lora_magnitude_vector["default"].weight.grad.dtype == F32
