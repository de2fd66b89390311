"""frozen_linear: the base alone, against float64; nothing is kept."""

import pytest
import torch
import torch.nn.functional as F

from fastpeft.ops.frozen_linear import frozen_linear
from fastpeft.ops.int8 import quantize_int8
from fastpeft.ops.nf4 import quantize_4bit
from tests.saved_bytes import SavedBytes
from tests.tolerance import assert_bits_equal, assert_no_worse

BASES = {
    "nf4": lambda w: quantize_4bit(w, double_quant=True),
    "blocks_across_rows": lambda w: quantize_4bit(w, "fp4", blocksize=256),
    "int8": quantize_int8,
}


@pytest.mark.watched
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_no_worse_than_eager_and_nothing_kept(base, dtype, impl, device):
    w = BASES[base](torch.randn(33, 96, device=device))
    x, bias = (
        torch.randn(2, 5, 96).to(device, dtype).requires_grad_(),
        torch.randn(33).to(device, dtype).requires_grad_(),
    )
    dy = torch.randn(2, 5, 33).to(device, dtype)
    with SavedBytes([x, bias, *w.tensors().values()]) as saved:
        y = frozen_linear(x, w, bias, impl=impl)
    assert saved.total() == 0
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    wide = [t.detach().double() for t in (x, bias, dy)]
    exact_w = w.dequantize(torch.float64)
    assert_no_worse(
        "y", y.detach(), F.linear(wide[0], exact_w, wide[1]), F.linear(x, w.dequantize(dtype), bias).detach()
    )
    assert_no_worse("dx", dx, wide[2] @ exact_w, dy @ w.dequantize(dtype))
    assert_no_worse("dbias", dbias, wide[2].sum((0, 1)), dy.sum((0, 1)))


def test_a_dense_weight_is_a_plain_call():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    assert_bits_equal("y", frozen_linear(x, w), F.linear(x, w))


def test_no_rows_and_other_widths():
    w = quantize_4bit(torch.randn(6, 64))
    assert frozen_linear(torch.zeros(0, 64), w).shape == (0, 6)
    with pytest.raises(ValueError, match=r"K=64.*\(3, 65\)"):
        frozen_linear(torch.zeros(3, 65), w)
