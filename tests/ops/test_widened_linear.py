"""widened_linear: against float64, and it keeps x as it came."""

import pytest
import torch
import torch.nn.functional as F

from fastpeft.ops.widened_linear import widened_linear
from tests.saved_bytes import SavedBytes
from tests.tolerance import assert_bits_equal, assert_no_worse


@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 33), (33,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_worse_than_eager(dtype, shape):
    x = torch.randn(shape).to(dtype).requires_grad_()
    w, bias = torch.randn(7, shape[-1]).requires_grad_(), torch.randn(7).requires_grad_()
    dy = torch.randn(*shape[:-1], 7)
    with SavedBytes([w, bias, x]) as saved:
        y = widened_linear(x, w, bias)
    assert saved.total() == 0, "a widened copy of x was kept"
    wide = [t.detach().double().requires_grad_() for t in (x, w, bias)]
    exact, eager = F.linear(*wide), F.linear(x.float(), w, bias)
    assert_no_worse("y", y.detach(), exact.detach(), eager.detach())
    grads = [
        torch.autograd.grad(out, inputs, dy.to(out.dtype))
        for out, inputs in ((y, (x, w, bias)), (exact, wide), (eager, (x, w, bias)))
    ]
    for name, got, right, plain in zip(("dx", "dw", "dbias"), *grads, strict=True):
        assert_no_worse(name, got, right, plain)


def test_autocast_is_obeyed():
    x, w, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = widened_linear(x.bfloat16(), w, bias)
    assert_bits_equal("y", y, F.linear(x.bfloat16(), w.bfloat16(), bias.bfloat16()))


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"K=8.*\(3, 9\)"):
        widened_linear(torch.zeros(3, 9), torch.zeros(5, 8), torch.zeros(5))


def test_it_can_be_differentiated_twice():
    x, w, bias = torch.randn(3, 8).bfloat16(), torch.randn(5, 8, requires_grad=True), torch.randn(5, requires_grad=True)
    second = []
    for run in (widened_linear, lambda x, w, bias: F.linear(x.float(), w, bias)):
        v = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(run(v, w, bias).square().sum(), v, create_graph=True)
        second.append(torch.autograd.grad(dx.float().square().sum(), w)[0])
    assert_bits_equal("d(dx)/dw", *second)
