"""The formula of the linear cross-entropy against F.cross_entropy and its own pieces, in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastpeft.reference.cross_entropy import linear_cross_entropy
from tests.tolerance import GRADCHECK, OTHER_ORDER_OF_SUMS, assert_close


def draw():
    x, w, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (11, 4), (11,)))
    return x, w, bias, torch.tensor([3, -100, 0, 10, -100, 7])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_equals_pytorch(label_smoothing):
    x, w, bias, labels = draw()
    expected = F.cross_entropy(F.linear(x, w, bias), labels, reduction="none", label_smoothing=label_smoothing)
    got = linear_cross_entropy(x, w, labels, bias, label_smoothing=label_smoothing)
    assert_close("loss", got, expected, OTHER_ORDER_OF_SUMS)


def test_each_term():
    x, w, _, labels = draw()
    kept = labels != -100
    logits = 2.0 * torch.tanh(0.5 * F.linear(x, w) / 2.0)
    expected = F.cross_entropy(logits, labels, reduction="none") + 0.1 * logits.logsumexp(-1).square() * kept
    got = linear_cross_entropy(x, w, labels, softcap=2.0, logit_scale=0.5, z_loss=0.1)
    assert_close("loss", got, expected, OTHER_ORDER_OF_SUMS)


def test_a_row_that_is_ignored_may_be_anything():
    x, w, bias, labels = draw()
    x[1] = float("nan")
    x.requires_grad_()
    losses = linear_cross_entropy(x, w, labels, bias)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert losses[1] == 0


def test_gradients():
    *leaves, labels = draw()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    options = {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 0.7, "z_loss": 1e-2}
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, labels, b, **options), leaves, **GRADCHECK
    )
