"""Named adapters on a wrapped module: switching, merging and restoring, deleting, full copies of modules."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.layers.adapter import AdapterLayer, ModulesToSaveWrapper
from fastpeft.layers.lora import LoRAEmbedding, LoRALinear
from tests.tolerance import MERGED_EQUALS_UNMERGED, assert_bits_equal, assert_close

K, N = 40, 24


def _linear(dtype, bias=True):
    return nn.Linear(K, N, bias=bias).to(dtype), torch.randn(33, K, dtype=dtype)


BASES = {
    "linear": lambda dtype: _linear(dtype),
    "no_bias": lambda dtype: _linear(dtype, bias=False),
    "conv1d": lambda dtype: (Conv1D(N, K).to(dtype), torch.randn(33, K, dtype=dtype)),
    "embedding": lambda dtype: (nn.Embedding(K, N, dtype=dtype), torch.arange(33)),
}


def make(base: nn.Module, names, **options) -> AdapterLayer:
    kind = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
    first, *others = [kind(base, 3 + i, 5 + i, adapter_name=name, **options) for i, name in enumerate(names)]
    for other in others:
        first.absorb(other)
    for name in names:
        for tensor in first.adapter_tensors(name).values():
            nn.init.normal_(tensor, std=0.2)
    first.set_adapter(names)
    return first


def parameters(base: nn.Module) -> dict[str, nn.Parameter | None]:
    return dict(base._parameters)


def assert_same_base(base: nn.Module, objects: dict, values: dict) -> None:
    """The very Parameter objects are back, with the bits that they had."""
    assert set(parameters(base)) == set(objects)
    for name, parameter in objects.items():
        assert parameters(base)[name] is parameter, name
        if parameter is not None:
            assert_bits_equal(name, parameter.detach(), values[name])


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["1", "2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize(
    ("kind", "lora_bias"),
    [(kind, bias) for kind in BASES for bias in (False, True) if not (bias and kind == "embedding")],
)
def test_merging_is_the_same_function_and_unmerging_restores_the_bits(kind, dtype, names, lora_bias):
    """Subtracting what was added would leave rounding behind: PEFT's unmerge does, so bf16 weights drift."""
    base, x = BASES[kind](dtype)
    layer = make(base, names, **({"lora_bias": True} if lora_bias else {}))
    objects = parameters(base)
    values = {name: p.detach().clone() for name, p in objects.items() if p is not None}
    with torch.no_grad():
        beside = layer(x)
        layer.merge()
        assert layer.merged
        assert layer.merged_adapters == names
        merged = layer(x)
        if dtype != torch.bfloat16:
            assert_close("merged", merged, beside, MERGED_EQUALS_UNMERGED)
        assert not torch.equal(base.weight, values["weight"])
        assert base.weight.dtype == dtype
        layer.merge()  # again: nothing is added twice
        assert_bits_equal("merged twice", layer(x), merged)
        layer.unmerge()
        assert_same_base(base, objects, values)
        assert not layer.merged
        assert_bits_equal("beside again", layer(x), beside)
        layer.unmerge()  # again: nothing to do
        assert_same_base(base, objects, values)


def test_bfloat16_merge_rounds_once():
    """The sum of the base and all deltas is taken in float32, not rounded to bfloat16 after each adapter."""
    base = nn.Linear(K, N, dtype=torch.bfloat16)
    layer = make(base, ["one", "two", "three"])
    with torch.no_grad():
        total = base.weight.float() + sum(layer.delta_weight(name) for name in ("one", "two", "three"))
    layer.merge()
    assert_bits_equal("weight", base.weight.detach(), total.bfloat16())


def test_merging_one_after_the_other_is_merging_both():
    layer = make(nn.Linear(K, N), ["one", "two"], lora_bias=True)
    layer.merge(["one", "two"])
    weight, bias = layer.base_layer.weight.detach().clone(), layer.base_layer.bias.detach().clone()
    layer.unmerge()
    layer.merge(["one"])
    layer.merge(["two"])
    assert_bits_equal("weight", layer.base_layer.weight.detach(), weight)
    assert_bits_equal("bias", layer.base_layer.bias.detach(), bias)


@pytest.mark.parametrize("where", ["lora_B", "lora_A", "bias"])
def test_safe_merge_refuses_what_is_not_finite(where):
    base = nn.Linear(K, N)
    layer = make(base, ["one"], lora_bias=True)
    objects = parameters(base)
    values = {name: p.detach().clone() for name, p in objects.items()}
    broken = {
        "lora_A": layer.lora_A["one"].weight,
        "lora_B": layer.lora_B["one"].weight,
        "bias": layer.lora_B["one"].bias,
    }
    broken[where].data.view(-1)[1] = float("nan" if where == "lora_A" else "inf")
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert_same_base(base, objects, values)
    layer.merge()  # without safe_merge it is the user's own affair
    assert layer.merged


def test_merged_weights_are_frozen_and_the_tied_module_does_not_see_them():
    embedding, head = nn.Embedding(K, N), nn.Linear(N, K, bias=False)
    head.weight = embedding.weight
    layer = make(embedding, ["one"])
    before = head.weight.detach().clone()
    layer.merge()
    assert_bits_equal("tied partner", head.weight.detach(), before)
    assert not embedding.weight.requires_grad
    layer.unmerge()
    assert head.weight is embedding.weight


@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_disabled_is_the_base_and_enabled_is_as_before(merged):
    base, x = _linear(torch.bfloat16)
    layer = make(base, ["one", "two"])
    with torch.no_grad():
        plain = base(x)
        if merged:
            layer.merge()
        active = layer(x)
        layer.enable_adapters(False)
        assert_bits_equal("disabled", layer(x), plain)
        assert not layer.merged
        layer.enable_adapters(True)
        assert layer.merged is merged
        assert_bits_equal("enabled", layer(x), active)


@pytest.mark.parametrize("merged", [[], ["one"], ["one", "two"]], ids=["beside", "one_merged", "both_merged"])
def test_deleting_an_adapter_leaves_the_others(merged):
    base, x = _linear(torch.float32)
    layer = make(base, ["one", "two"], lora_dropout=0.1).eval()
    weight = base.weight.detach().clone()
    layer.set_adapter("two")
    with torch.no_grad():
        two = layer(x)
        layer.set_adapter(["one", "two"])
        layer.merge(merged)
        layer.delete_adapter("one")
        layer.unmerge()
        assert_bits_equal("two is left", layer(x), two)
    assert layer.adapter_names == layer.active_adapters == ["two"]
    for attribute in (*layer.adapter_attributes, *layer.settings_attributes):
        assert list(getattr(layer, attribute)) == ["two"], attribute
    assert_bits_equal("base", base.weight.detach(), weight)


def test_moving_to_another_dtype_while_merged():
    """unmerge gave the set-aside float32 weight back to a model that had become bfloat16."""
    base, x = _linear(torch.float32)
    layer = make(base, ["one"], lora_bias=True)
    expected = base.weight.detach().to(torch.bfloat16)
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert_bits_equal("weight", base.weight.detach(), expected)
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_set_adapter_trains_the_active_ones_only():
    layer = make(nn.Linear(K, N), ["one", "two"])
    trained = lambda: {name for name, p in layer.named_parameters() if p.requires_grad}  # noqa: E731
    layer.set_adapter("two")
    assert trained() == {"lora_A.two.weight", "lora_B.two.weight"}
    layer.set_adapter(["two", "absent", "one"])
    assert layer.active_adapters == ["two", "one"]
    assert len(trained()) == 4
    layer.set_adapter("one", trainable=False)
    assert layer.active_adapters == ["one"]
    assert trained() == set()


def test_active_adapters_are_the_ones_that_act():
    base, x = _linear(torch.float32)
    layer = make(base, ["one", "two"])
    with torch.no_grad():
        layer.set_adapter([])
        assert_bits_equal("none", layer(x), base(x))
        both = layer.delta_weight("one") + layer.delta_weight("two")
        layer.set_adapter(["one", "two"])
        assert_close("both", layer(x), base(x) + x @ both.t(), MERGED_EQUALS_UNMERGED)


def test_unknown_attributes_are_the_base_s_or_an_error():
    layer = make(nn.Linear(K, N), ["one"])
    assert layer.out_features == N
    with pytest.raises(AttributeError, match="no_such_thing"):
        layer.no_such_thing  # noqa: B018


def test_a_method_without_a_merged_form_says_so():
    with pytest.raises(NotImplementedError, match="AdapterLayer"):
        AdapterLayer(nn.Linear(2, 2)).delta_weight("one")


# -- modules that are trained in full -----------------------------------------------------------------------------------


def _saved(names=("one",)):
    base = nn.Sequential(nn.Linear(K, N), nn.BatchNorm1d(N))
    first, *others = [ModulesToSaveWrapper(base, name, copy.deepcopy(base)) for name in names]
    for other in others:
        first.absorb(other)
    for name in names:
        nn.init.normal_(first.modules_to_save[name][0].weight)
    return first.eval(), torch.randn(5, K)


def test_full_copy_acts_when_active():
    layer, x = _saved(["one", "two"])
    with torch.no_grad():
        for name in ("one", "two"):
            layer.set_adapter(name)
            assert_bits_equal(name, layer(x), layer.modules_to_save[name](x))
            assert all(
                p.requires_grad is (n == name) for n in ("one", "two") for p in layer.modules_to_save[n].parameters()
            )
        layer.enable_adapters(False)
        assert_bits_equal("disabled", layer(x), layer.original_module(x))
        layer.enable_adapters(True)
        layer.set_adapter("absent")
        assert_bits_equal("none active", layer(x), layer.original_module(x))


def test_full_copy_is_saved_with_its_buffers_and_baked_in():
    layer, _ = _saved()
    layer.set_adapter("one")
    assert set(layer.adapter_tensors("one")) == set(layer.original_module.state_dict())
    assert layer.adapter_tensors("absent") == {}
    assert layer.bake(["one"]) is layer.modules_to_save["one"]
    assert layer.bake(["absent"]) is layer.original_module


def test_two_full_copies_do_not_add_up():
    layer, _ = _saved(["one", "two"])
    with pytest.raises(ValueError, match="at most one active adapter"):
        layer.set_adapter(["one", "two"])
