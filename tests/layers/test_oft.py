"""OFTLinear: y = x blockdiag(R) W^T + bias in float64 for every option and base; the ball of coft; dropout; sizes."""

import copy
import math

import pytest
import torch

from fastpeft.layers.oft import OFTLinear, nearest_divisor, oft_blocks
from tests.layers.multiplicative_bases import BASES, float64_parts, linear
from tests.tolerance import MERGED_EQUALS_UNMERGED, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

OPTIONS = {
    "series": {},
    "exact": {"use_cayley_neumann": False},
    "share": {"block_share": True},
    "coft": {"coft": True, "eps": 0.3},
    "coft_share": {"coft": True, "eps": 0.3, "block_share": True},
    "two_blocks": {"r": 2, "oft_block_size": 0},
}


def wrap(base, name: str = "default", seed: int = 1, **options):
    torch.manual_seed(seed)
    layer = OFTLinear(base, adapter_name=name, init_weights=False, **({"oft_block_size": 4} | options))
    return layer.eval()


def blocks(weight, size, options):
    """R of every row of the parameter, in plain float64 code."""
    rotations = []
    for upper in weight.detach().double():
        q = torch.zeros(size, size, dtype=torch.float64)
        k = 0
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j], q[j, i] = upper[k], -upper[k]
                k += 1
        if options.get("coft"):
            limit = options["eps"] / math.sqrt(len(weight))
            if q.norm() > limit:
                q = limit * q / q.norm()
        eye = torch.eye(size, dtype=torch.float64)
        if options.get("use_cayley_neumann", True):
            rotations.append(eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
        else:
            rotations.append((eye - q) @ torch.linalg.inv(eye + q))
    return rotations


def expected(base, x, weight, options):
    w, bias = float64_parts(base)
    size = round((1 + math.sqrt(1 + 8 * weight.shape[1])) / 2)
    rotations = blocks(weight, size, options)
    if options.get("block_share"):
        rotations = rotations * (w.shape[1] // size)
    return x.double() @ torch.block_diag(*rotations) @ w.t() + bias


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", BASES)
def test_the_formula_and_merging(kind, options):
    base = BASES[kind]()
    layer = wrap(base, **options)
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    exact = expected(base, x, layer.oft_R["default"].weight, options)
    y = layer(x)
    assert_close("y", y, exact, OTHER_ORDER_OF_SUMS)
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.oft_R["default"].weight.grad.abs().sum() > 0
    weight = base.weight if base.weight.is_floating_point() else layer.frozen_weight().dequantize(torch.float32)
    merged, bias = layer.merged_tensors(["default"], weight, base.bias)
    if layer.fan_in_fan_out:
        merged = merged.t()
    assert_close("merged", torch.nn.functional.linear(x, merged, bias), exact, MERGED_EQUALS_UNMERGED)


def test_several_adapters_rotate_one_after_the_other_and_merge_to_the_same():
    """PEFT merges them in the other order than it applies them."""
    base = linear()
    layer = wrap(base, "a", oft_block_size=4)
    layer.absorb(wrap(base, "b", seed=2, oft_block_size=6))
    layer.set_adapter(["a", "b"])
    x = torch.randn(3, layer.in_features)
    w, bias = float64_parts(base)
    a, b = (torch.block_diag(*blocks(layer.oft_R[n].weight, s, {})) for n, s in (("a", 4), ("b", 6)))
    exact = x.double() @ a @ b @ w.t() + bias
    assert_close("y", layer(x), exact, OTHER_ORDER_OF_SUMS)
    layer.merge(["a"])
    layer.merge(["b"])
    assert_close("merged", layer(x), exact, MERGED_EQUALS_UNMERGED)
    layer.unmerge()
    assert_close("unmerged", layer(x), exact, OTHER_ORDER_OF_SUMS)


def test_coft_moves_the_weight_into_the_ball_in_training_only():
    layer = wrap(linear(), coft=True, eps=0.3)
    weight = layer.oft_R["default"].weight
    before, x = weight.detach().clone(), torch.randn(3, layer.in_features)
    y = layer(x)
    assert_bits_equal("eval", weight.detach(), before)
    y.square().sum().backward()
    in_eval = weight.grad.clone()
    weight.grad = None
    layer.train()
    trained = layer(x)
    assert_close("y", trained, y, OTHER_ORDER_OF_SUMS)
    norms = math.sqrt(2) * weight.detach().norm(dim=1)
    limit = 0.3 / math.sqrt(len(weight))
    assert_close("|Q|", norms, torch.full_like(norms, limit), OTHER_ORDER_OF_SUMS)
    trained.square().sum().backward()
    assert_close("gradient", weight.grad, in_eval, OTHER_ORDER_OF_SUMS)
    once = weight.detach().clone()
    layer(x)
    assert_bits_equal("moved once", weight.detach(), once)


def test_coft_starts_from_no_rotation():
    layer = OFTLinear(linear(), oft_block_size=4, coft=True)
    x = torch.randn(3, layer.in_features)
    assert_close("y", layer(x), layer.base_layer(x), OTHER_ORDER_OF_SUMS)


def test_module_dropout_makes_some_blocks_the_identity_in_training():
    layer = wrap(linear(), oft_block_size=4, module_dropout=0.5).train()  # 3 of 6 blocks
    rotation = layer.oft_R["default"]
    x = torch.randn(5, layer.in_features)
    counts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        same = (rotation(x) == x).view(5, 6, 4).all(-1).all(0)
        assert same.sum() == 3
        counts.add(tuple(same.tolist()))
    assert len(counts) > 1
    assert not (rotation.eval()(x) == x).view(5, 6, 4).all(-1).any()


def test_half_precision_is_rotated_as_it_is():
    base = linear(dtype=torch.bfloat16)
    layer = wrap(base)
    assert layer.oft_R["default"].weight.dtype == torch.float32
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    exact = expected(base, x, layer.oft_R["default"].weight, {})
    error = (layer(x).double() - exact).abs().max()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_a_deep_copy_is_its_own():
    layer = wrap(linear())
    other = copy.deepcopy(layer)
    other.oft_R["default"].weight.data.zero_()
    x = torch.randn(3, layer.in_features)
    assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((64, 0, 24), "oft_block_size a divisor of in_features=64, got 24; take 16 or 32"),
        ((64, 0, 100), "got 100; take 64"),
        ((64, 3, 0), "expected r a divisor of in_features=64, got 3; take 2 or 4"),
    ],
    ids=["between", "beyond", "number"],
)
def test_blocks_that_do_not_divide_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        oft_blocks("OFT", *sizes)


def test_the_sizes_that_peft_takes_instead():
    from peft.tuners.oft.layer import OFTLayer

    for whole in (60, 64, 97):
        for number in range(1, 110):
            if whole % number or number > whole:
                assert nearest_divisor(whole, number) == OFTLayer.adjust_oft_parameters(None, whole, number)
    assert oft_blocks("OFT", 64, 0, 24, adjust=True) == (4, 16)
    assert oft_blocks("OFT", 64, 3, 0, adjust=True) == (2, 32)
