"""The reference is the specification: it is checked against numbers worked out by hand and by finite differences."""

import pytest
import torch

from fastpeft.reference.lora import lora_embedding, lora_linear
from tests import tolerance
from tests.tolerance import assert_bits_equal


def test_value_by_hand():
    x = torch.tensor([[1.0, 2.0]])
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    a = torch.tensor([[3.0, 4.0]])  # x a^T = 11
    b = torch.tensor([[1.0], [0.0], [-1.0]])
    bias = torch.tensor([0.5, 0.5, 0.5])
    y = lora_linear(x, w, a, b, bias, scale=2.0)
    assert y.tolist() == [[1 + 22 + 0.5, 2 + 0.5, 3 - 22 + 0.5]]


def test_dropout_by_hand():
    x = torch.tensor([[1.0, 2.0]])
    keep = torch.tensor([[False, True]])
    w, a, b = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.ones(1, 1)
    assert lora_linear(x, w, a, b, dropout_p=0.75, keep=keep).item() == 2 * 4 / 0.25


@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("with_keep", [False, True], ids=["keep_all", "dropout"])
def test_gradcheck(with_bias, with_keep):
    m, n, k, r = 4, 5, 7, 3
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    keep = torch.rand(m, k) > 0.3 if with_keep else None
    options = {"scale": 1.7, "dropout_p": 0.3 if with_keep else 0.0, "keep": keep}
    args = (draw(m, k), draw(n, k), draw(r, k), draw(n, r), *([draw(n)] if with_bias else []))
    assert torch.autograd.gradcheck(lambda *tensors: lora_linear(*tensors, **options), args, **tolerance.GRADCHECK)


def test_leading_dimensions_are_rows():
    x, w = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    a, b = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y = lora_linear(x, w, a, b)
    for i in range(2):
        torch.testing.assert_close(y[i], lora_linear(x[i], w, a, b))


def test_embedding_is_the_row_of_the_merged_table():
    ids = torch.tensor([[0, 3], [3, 5]])
    w, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (2, 6), (4, 2)))
    y = lora_embedding(ids, w, a, b, scale=0.5)
    torch.testing.assert_close(y, (w + 0.5 * (b @ a).t())[ids])
    assert_bits_equal("same id, same row", y[0, 1], y[1, 0])


def test_embedding_gradcheck():
    ids = torch.tensor([0, 3, 3])
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 4), (2, 6), (4, 2))]
    function = lambda w, a, b: lora_embedding(ids, w, a, b, scale=0.5)  # noqa: E731
    assert torch.autograd.gradcheck(function, args, **tolerance.GRADCHECK)
