"""BOFTLinear: against PEFT's own permutations as dense matrices in float64, for one to three butterfly factors."""

import pytest
import torch

from fastpeft.layers.boft import BOFTLinear, boft_blocks
from tests.layers.multiplicative_bases import BASES, float64_parts, linear
from tests.tolerance import MERGED_EQUALS_UNMERGED, OTHER_ORDER_OF_SUMS, assert_close

SIZES = {  # size, number, factors; of 24 or 64 inputs
    "one": (4, 0, 1),
    "odd_size": (1, 0, 1),
    "number": (0, 4, 1),
    "two": (2, 0, 2),
    "three": (2, 0, 3),
    "two_of_four": (0, 2, 2),
}


def wrap(base, sizes, name: str = "default", seed: int = 1, **options):
    torch.manual_seed(seed)
    return BOFTLinear(base, *sizes, adapter_name=name, init_weights=False, **options).eval()


def dense_rotation(a: torch.Tensor) -> torch.Tensor:
    """M_m ... M_1, by PEFT's permutation of every factor."""
    from peft.tuners.boft.layer import BOFTLayer

    a = a.detach().double()
    factors, count, size, _ = a.shape
    width, total = count * size, None
    for i in range(factors):
        order = BOFTLayer.block_butterfly_perm(None, width, count // 2**i, size // 2, factors - 1)
        p = torch.zeros(width, width, dtype=torch.float64)
        p[torch.arange(width), order] = 1
        eye = torch.eye(size, dtype=torch.float64)
        q = 0.5 * (a[i] - a[i].transpose(1, 2))
        rotation = p @ torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q))) @ p.t()
        total = rotation if total is None else rotation @ total
    return total


def expected(base, x, layer, names=("default",)):
    w, bias = float64_parts(base)
    rotation, scale = torch.eye(w.shape[1], dtype=torch.float64), 1
    for name in names:
        rotation = dense_rotation(layer.boft_R[name]) @ rotation
        scale = layer.boft_s[name].detach().double().flatten() * scale
    return scale * (x.double() @ rotation @ w.t()) + bias


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", BASES)
def test_the_formula_and_merging(kind, sizes):
    base = BASES[kind]()
    layer = wrap(base, sizes)
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    exact = expected(base, x, layer)
    y = layer(x)
    assert_close("y", y, exact, OTHER_ORDER_OF_SUMS)
    y.square().sum().backward()
    assert layer.boft_s["default"].grad.abs().sum() > 0
    if layer.boft_block_size["default"] > 1:
        assert layer.boft_R["default"].grad.abs().sum() > 0
    weight = base.weight if base.weight.is_floating_point() else layer.frozen_weight().dequantize(torch.float32)
    merged, bias = layer.merged_tensors(["default"], weight, base.bias)
    if layer.fan_in_fan_out:
        merged = merged.t()
    assert_close("merged", torch.nn.functional.linear(x, merged, bias), exact, MERGED_EQUALS_UNMERGED)


def test_several_adapters_and_their_merge():
    base = linear()
    layer = wrap(base, (4, 0, 1), "a")
    layer.absorb(wrap(base, (2, 0, 2), "b", seed=2))
    layer.set_adapter(["a", "b"])
    x = torch.randn(3, layer.in_features)
    exact = expected(base, x, layer, ("a", "b"))
    assert_close("y", layer(x), exact, OTHER_ORDER_OF_SUMS)
    layer.merge()
    assert_close("merged", layer(x), exact, MERGED_EQUALS_UNMERGED)


def test_a_hook_on_the_base_is_called():
    base = linear()
    layer = wrap(base, (4, 0, 1))
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    base.register_forward_hook(lambda module, inputs, output: output + 1)
    moved = plain + layer.boft_s["default"].detach().flatten()
    assert_close("y", layer(x), moved, OTHER_ORDER_OF_SUMS)


def test_dropout_makes_blocks_of_one_factor_the_identity_in_training():
    layer = wrap(linear(), (2, 0, 2), boft_dropout=0.5).train()  # 6 of 12 blocks of one factor
    eye = torch.eye(2)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        rotations = layer._dropped(layer.rotations("default"), 0.5)
        same = (rotations == eye).all(-1).all(-1).sum(1).tolist()
        assert sorted(same) == [0, 6]
        seen.add(tuple(same))
    assert len(seen) == 2
    assert not (layer.eval()._dropped(layer.rotations("default"), 0.5) == eye).all(-1).all(-1).any()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((5, 0, 1), "boft_block_size a divisor of in_features=24, got 5"),
        ((0, 7, 1), "boft_block_num a divisor of in_features=24, got 7"),
        ((3, 0, 2), "blocks of even size"),
        ((8, 0, 2), "a multiple of 2 of them for boft_n_butterfly_factor=2, got 3 blocks of 8"),
        ((4, 0, 3), "a multiple of 4 of them"),
    ],
    ids=["size", "number", "odd_size", "odd_number", "too_many_factors"],
)
def test_sizes_that_do_not_fit_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        boft_blocks("BOFT", 24, *sizes)
