"""IA3Linear: its two formulas in float64 on every kind of base, several adapters, half precision, merging."""

import pytest
import torch

from fastpeft.layers.ia3 import IA3Linear
from tests.layers.multiplicative_bases import BASES, float64_parts, linear
from tests.saved_bytes import SavedBytes
from tests.tolerance import MERGED_EQUALS_UNMERGED, OTHER_ORDER_OF_SUMS, assert_close


def wrap(base, is_feedforward: bool, name: str = "default", seed: int = 1):
    layer = IA3Linear(base, adapter_name=name, is_feedforward=is_feedforward)
    torch.manual_seed(seed)
    layer.ia3_l[name].data.uniform_(-1, 2)
    return layer


def expected(base, x, scales, is_feedforward):
    weight, bias = float64_parts(base)
    l_ = scales.detach().double().flatten()
    return (x.double() * l_) @ weight.t() + bias if is_feedforward else l_ * (x.double() @ weight.t() + bias)


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("kind", BASES)
def test_the_formula_and_merging(kind, is_feedforward):
    base = BASES[kind]()
    layer = wrap(base, is_feedforward)
    x = torch.randn(5, layer.in_features, requires_grad=True)
    y = layer(x)
    exact = expected(base, x, layer.ia3_l["default"], is_feedforward)
    assert_close("y", y, exact, OTHER_ORDER_OF_SUMS)
    y.sum().backward()
    assert layer.ia3_l["default"].grad.shape == ((1, layer.in_features) if is_feedforward else (layer.out_features, 1))
    if kind in ("linear", "no_bias", "conv1d"):  # a quantised weight is rounded anew
        layer.merge()
        assert_close("merged", layer(x), exact, MERGED_EQUALS_UNMERGED)
    else:
        weight, bias = layer.merged_tensors(["default"], layer.frozen_weight().dequantize(torch.float32), base.bias)
        assert_close("merged", x.detach() @ weight.t() + bias, exact, MERGED_EQUALS_UNMERGED)


def test_the_vectors_of_several_adapters_multiply_on_either_side():
    base = linear()
    layer = wrap(base, False, "a")
    layer.absorb(wrap(base, True, "b", seed=2))
    layer.absorb(wrap(base, False, "c", seed=3))
    layer.set_adapter(["a", "b", "c"])
    x = torch.randn(3, layer.in_features)
    weight, bias = float64_parts(base)
    a, b, c = (layer.ia3_l[name].detach().double().flatten() for name in "abc")
    exact = a * c * ((x.double() * b) @ weight.t() + bias)
    assert_close("y", layer(x), exact, OTHER_ORDER_OF_SUMS)
    layer.merge()
    assert_close("merged", layer(x), exact, MERGED_EQUALS_UNMERGED)


def test_a_small_step_of_a_vector_acts_in_half_precision():
    """l = 1.003 rounds to 1 in bfloat16; the product is taken in float32 and rounded once."""
    base = linear(dtype=torch.bfloat16)
    layer = wrap(base, False)
    assert layer.ia3_l["default"].dtype == torch.float32
    layer.ia3_l["default"].data.fill_(1.003)
    x = torch.randn(64, layer.in_features, dtype=torch.bfloat16)
    plain = base(x)
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), (plain.float() * 1.003).bfloat16())
    assert not torch.equal(layer(x), plain)


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
def test_it_keeps_only_what_the_vector_multiplies(is_feedforward):
    base = linear(dtype=torch.bfloat16)
    layer = wrap(base, is_feedforward)
    x = torch.randn(64, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with SavedBytes([x, *layer.parameters()]) as saved:
        y = layer(x)
    assert saved.total() == (0 if is_feedforward else y.nbytes)


def test_random_start():
    assert torch.equal(IA3Linear(linear()).ia3_l["default"], torch.ones(12, 1))
    assert not torch.equal(IA3Linear(linear(), init_ia3_weights=False).ia3_l["default"], torch.ones(12, 1))
