"""Rotations by blocks against a dense block-diagonal matrix in float64; the Cayley map and its series against their formulas."""

import pytest
import torch

from fastpeft.ops.block_rotation import cayley, cayley_neumann, rotate_blocks, skew_from_upper, upper_indices
from tests.tolerance import GRADCHECK, OTHER_ORDER_OF_SUMS, assert_close, assert_no_worse

# rows, K, block size, one block for all
SHAPES = {
    "aligned": (64, 128, 32, False),
    "wide_blocks": (33, 128, 64, False),
    "joined": (33, 96, 4, False),
    "odd": (5, 105, 7, False),
    "prime_number_of_blocks": (3, 44, 4, False),
    "one_row": (1, 64, 8, False),
    "one_block": (7, 20, 20, False),
    "shared": (9, 96, 8, True),
    "shared_odd": (3, 105, 5, True),
    "blocks_of_one": (4, 6, 1, False),
}


def dense(x, rotation):
    """x times the block-diagonal matrix, written out."""
    size = rotation.shape[-1]
    blocks = list(rotation) if len(rotation) > 1 else [rotation[0]] * (x.shape[-1] // size)
    return x @ torch.block_diag(*blocks).to(x.dtype)


def near_identity(count, size, generator):
    return torch.eye(size) + 0.1 * torch.randn(count, size, size, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_y_and_gradients_are_no_worse_than_a_dense_rotation_s(shape, dtype):
    rows, width, size, shared = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    dy = torch.randn(rows, width, generator=generator).to(dtype)
    rotation = near_identity(1 if shared else width // size, size, generator)

    def run(function, wide):
        leaves = [x.to(wide or x.dtype).requires_grad_(), rotation.to(wide or rotation.dtype).requires_grad_()]
        y = function(*leaves)
        return {"y": y.detach(), **dict(zip(("dx", "dr"), torch.autograd.grad(y, leaves, dy.to(y.dtype)), strict=True))}

    exact, eager, got = run(dense, torch.float64), run(dense, None), run(rotate_blocks, None)
    for key in exact:
        assert_no_worse(key, got[key], exact[key], eager[key])


def test_a_strided_input_of_three_dimensions():
    x = torch.randn(8, 3, 5).permute(1, 2, 0)
    rotation = torch.randn(2, 4, 4)
    assert_close("y", rotate_blocks(x, rotation), dense(x, rotation), OTHER_ORDER_OF_SUMS)


def test_a_rotation_below_half_precision_s_resolution_is_not_lost():
    """A cosine of 0.9982 is 1 in bfloat16, so that R rounded makes every row longer; I + (R - I) does not."""
    r = cayley(skew_from_upper(torch.tensor([[0.03]]), 2, upper_indices(2)))
    assert r.bfloat16()[0, 0, 0] == 1
    x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() @ r[0].double()

    def lengthened(y):
        return ((y.double() * exact).sum() / exact.square().sum() - 1).abs()

    assert lengthened(rotate_blocks(x, r)) < lengthened(x @ r[0].bfloat16()) / 4


def test_gradients_of_the_gradient_s_formula():
    torch.manual_seed(0)
    upper = torch.randn(3, 6, dtype=torch.float64) * 0.1
    x = torch.randn(4, 12, dtype=torch.float64)
    for make in (cayley, lambda q: cayley_neumann(q, 5)):

        def run(x, upper, make=make):
            return rotate_blocks(x, make(skew_from_upper(upper, 4, upper_indices(4))))

        assert torch.autograd.gradcheck(run, (x.requires_grad_(), upper.requires_grad_()), **GRADCHECK)


def test_skew_from_upper_fills_row_by_row():
    q = skew_from_upper(torch.tensor([[1.0, 2.0, 3.0]]), 3, upper_indices(3))
    assert q[0].tolist() == [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]


def test_cayley_is_orthogonal_and_is_its_formula():
    q = skew_from_upper(torch.randn(5, 15, dtype=torch.float64), 6, upper_indices(6))
    r, eye = cayley(q), torch.eye(6, dtype=torch.float64)
    assert_close("R^T R", r.transpose(1, 2) @ r, eye.expand_as(r), OTHER_ORDER_OF_SUMS)
    assert_close("R", r, (eye - q) @ torch.linalg.inv(eye + q), OTHER_ORDER_OF_SUMS)


# The factors of Q^0, Q^1, ... by the number of terms: the last is not doubled; three terms are four.
SERIES = {
    2: [1, 2],
    3: [1, 2, 2, 1],
    4: [1, 2, 2, 1],
    5: [1, 2, 2, 2, 1],
    6: [1, 2, 2, 2, 2, 1],
    7: [1, 2, 2, 2, 2, 2, 1],
}


@pytest.mark.parametrize("terms", SERIES)
def test_the_series_is_its_formula(terms):
    q = skew_from_upper(torch.randn(3, 10, dtype=torch.float64), 5, upper_indices(5))
    expected = sum(factor * torch.linalg.matrix_power(q, power) for power, factor in enumerate(SERIES[terms]))
    assert_close("R", cayley_neumann(q, terms), expected, OTHER_ORDER_OF_SUMS)


def test_under_autocast_rotations_are_made_in_float32():
    q = skew_from_upper(torch.randn(3, 10), 5, upper_indices(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        r = cayley_neumann(q, 5)
        y = rotate_blocks(torch.randn(2, 15), r)
    assert torch.equal(r, cayley_neumann(q, 5))
    assert y.dtype == torch.bfloat16


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="at least 2 terms, got 1"):
        cayley_neumann(torch.zeros(1, 2, 2), 1)
    with pytest.raises(ValueError, match=r"expected x \[..., K=8\], got \(3, 12\) and blocks of 4"):
        rotate_blocks(torch.zeros(3, 12), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="blocks of 5"):
        rotate_blocks(torch.zeros(3, 12), torch.zeros(1, 5, 5))
