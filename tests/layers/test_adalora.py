"""AdaLoRALinear: its formula in float64 on every kind of base, several adapters, dropout, half precision, merging, init."""

import pytest
import torch
from torch import nn

from fastpeft.layers.adalora import INIT_STD, RANK_EPS, AdaLoRALinear
from tests.layers.multiplicative_bases import BASES, float64_parts, linear
from tests.tolerance import (
    GRADIENTS_THROUGH_A_MODEL,
    MERGED_EQUALS_UNMERGED,
    OTHER_ORDER_OF_SUMS,
    SPREAD_OF_INIT,
    assert_bits_equal,
    assert_close,
)


def wrap(base, name: str = "default", seed: int = 1, r: int = 5, **options):
    layer = AdaLoRALinear(base, r=r, lora_alpha=16, adapter_name=name, **options)
    torch.manual_seed(seed)
    for tensor in layer.adapter_tensors(name).values():
        tensor.data.normal_(std=0.3)
    return layer


def update(layer, name: str, x: torch.Tensor) -> torch.Tensor:
    a, b, e = (getattr(layer, f"lora_{key}")[name].detach().double() for key in "ABE")
    return x.double() @ (a * e).t() @ b.t() * 16 / (a.shape[0] + RANK_EPS)


@pytest.mark.parametrize("r", [1, 5, 8])
@pytest.mark.parametrize("kind", BASES)
def test_the_formula_and_merging(kind, r):
    base = BASES[kind]()
    layer = wrap(base, r=r)
    weight, bias = float64_parts(base)
    x = torch.randn(3, 7, layer.in_features)
    exact = x.double() @ weight.t() + bias + update(layer, "default", x)
    assert_close("y", layer(x), exact, OTHER_ORDER_OF_SUMS)
    if kind in ("linear", "no_bias", "conv1d"):  # a quantised weight is rounded anew
        before = base.weight.detach().clone()
        layer.merge()
        assert_close("merged", layer(x), exact, MERGED_EQUALS_UNMERGED)
        layer.unmerge()
        assert_bits_equal("weight", base.weight, before)
    else:
        weight, bias = layer.merged_tensors(["default"], layer.frozen_weight().dequantize(torch.float32), base.bias)
        assert_close("merged", x @ weight.t() + bias, exact, MERGED_EQUALS_UNMERGED)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_the_gradients_are_those_of_the_plain_formula(kind):
    base = BASES[kind]()
    layer = wrap(base)
    weight, bias = float64_parts(base)
    x = torch.randn(6, layer.in_features, requires_grad=True)
    dy = torch.randn(6, layer.out_features)
    layer(x).backward(dy)
    exact = {"x": x.detach().double().requires_grad_()}
    exact |= {key: getattr(layer, f"lora_{key}")["default"].detach().double().requires_grad_() for key in "ABE"}
    y = exact["x"] @ weight.t() + bias
    y = y + exact["x"] @ (exact["A"] * exact["E"]).t() @ exact["B"].t() * 16 / (5 + RANK_EPS)
    y.backward(dy.double())
    got = {"x": x, **{key: getattr(layer, f"lora_{key}")["default"] for key in "ABE"}}
    for key, tensor in got.items():
        assert_close(key, tensor.grad, exact[key].grad, GRADIENTS_THROUGH_A_MODEL)
    assert base.weight.grad is None


def test_several_adapters_add_up():
    layer = wrap(linear(), "a", r=3)
    layer.absorb(wrap(layer.base_layer, "b", seed=2, r=5))
    layer.set_adapter(["a", "b"])
    x = torch.randn(4, layer.in_features)
    weight, bias = float64_parts(layer.base_layer)
    exact = x.double() @ weight.t() + bias + update(layer, "a", x) + update(layer, "b", x)
    assert_close("y", layer(x), exact, OTHER_ORDER_OF_SUMS)
    layer.merge()
    assert_close("merged", layer(x), exact, MERGED_EQUALS_UNMERGED)
    layer.delete_adapter("a")
    assert layer.adapter_names == ["b"]


def test_a_base_with_a_hook_runs_its_own_forward():
    """What a hook on the base does is kept, and the update is added to it."""
    layer = wrap(linear())
    x = torch.randn(4, layer.in_features)
    plain = layer(x)
    layer.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    assert_close("y", layer(x), plain + 1, OTHER_ORDER_OF_SUMS)


def test_dropout_acts_in_training_alone():
    layer = wrap(linear(), lora_dropout=0.5)
    x = torch.randn(4, layer.in_features)
    layer.eval()
    assert_bits_equal("eval", layer(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert_bits_equal("the same seed", layer(x), first)
    assert not torch.equal(first, second)


def test_a_half_precision_base_gets_float32_tensors_and_gives_its_own_dtype():
    layer = wrap(linear(dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in layer.adapter_tensors("default").values()} == {torch.float32}
    y = layer(torch.randn(4, layer.in_features, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_E["default"].grad.dtype == torch.float32
    own = AdaLoRALinear(linear(dtype=torch.bfloat16), autocast_adapter_dtype=False)
    assert own.lora_E["default"].dtype == torch.bfloat16


def test_the_start_is_peft_s():
    """E zero, A and B normal with standard deviation 0.02; without init_lora_weights all three are standard normal."""
    torch.manual_seed(0)
    layer = AdaLoRALinear(nn.Linear(512, 512), r=24)
    a, b, e = (getattr(layer, f"lora_{key}")["default"].detach() for key in "ABE")
    assert not e.any()
    for name, tensor, std in (("A", a, INIT_STD), ("B", b, INIT_STD)):
        assert abs(tensor.std().item() / std - 1) < SPREAD_OF_INIT, name
    drawn = AdaLoRALinear(nn.Linear(512, 512), r=24, init_lora_weights=False)
    assert abs(drawn.lora_A["default"].std().item() - 1) < SPREAD_OF_INIT
    assert drawn.lora_E["default"].abs().min() > 0


@pytest.mark.parametrize("alpha", [0, -1])
def test_an_alpha_that_is_not_positive_counts_as_the_rank(alpha):
    assert AdaLoRALinear(linear(), r=6, lora_alpha=alpha).scaling["default"] == 6 / (6 + RANK_EPS)


@pytest.mark.parametrize("options", [{"r": 0}, {"r": 2.5}, {"lora_dropout": 1.0}, {"adapter_name": "a.b"}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="AdaLoRALinear"):
        AdaLoRALinear(linear(), **options)


def test_a_module_that_is_not_linear_is_refused():
    with pytest.raises(TypeError, match=r"expected an nn.Linear"):
        AdaLoRALinear(nn.Embedding(4, 4))
