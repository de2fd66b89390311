"""The norms' references against numbers worked out by hand and finite differences."""

import pytest
import torch

from fastpeft.reference.norm import layer_norm, rms_norm
from tests.tolerance import GRADCHECK, OTHER_ORDER_OF_SUMS, assert_close


def test_values_by_hand():
    x = torch.tensor([[1.0, 7.0], [0.0, 0.0]])  # mean of squares 25; mean 4, distances 3
    weight, bias = torch.tensor([2.0, 1.0]), torch.tensor([0.5, -0.5])
    by_hand = torch.tensor([[2 / 6, 7 / 6], [0.0, 0.0]])
    assert_close("rms_norm", rms_norm(x, weight, eps=11.0), by_hand, OTHER_ORDER_OF_SUMS)
    expected = torch.tensor([[2 * -3 / 5 + 0.5, 3 / 5 - 0.5], [0.5, -0.5]])
    assert_close("layer_norm", layer_norm(x, weight, bias, eps=16.0), expected, OTHER_ORDER_OF_SUMS)
    offset = rms_norm(x, weight - 1, eps=11.0, offset=1.0)
    assert_close("offset", offset, rms_norm(x, weight, eps=11.0), OTHER_ORDER_OF_SUMS)
    assert_close("without a weight", rms_norm(x, None, eps=11.0), x / 6, OTHER_ORDER_OF_SUMS)


def test_as_pytorch_has_them():
    x, weight, bias = torch.randn(3, 5, 7).double(), torch.randn(7).double(), torch.randn(7).double()
    functional = torch.nn.functional
    expected = functional.rms_norm(x, (7,), weight, 1e-5)
    assert_close("rms_norm", rms_norm(x, weight, eps=1e-5), expected, OTHER_ORDER_OF_SUMS)
    expected = functional.layer_norm(x, (7,), weight, bias, 1e-5)
    assert_close("layer_norm", layer_norm(x, weight, bias, eps=1e-5), expected, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("centred", [False, True], ids=["rms_norm", "layer_norm"])
def test_gradcheck(centred):
    x, weight, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((3, 5), (5,), (5,)))
    if centred:
        assert torch.autograd.gradcheck(lambda *t: layer_norm(*t, eps=0.1), (x, weight, bias), **GRADCHECK)
    else:
        assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, eps=0.1, offset=1.0), (x, weight), **GRADCHECK)
