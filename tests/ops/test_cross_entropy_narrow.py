"""Gradients of logits that take the place of logits of twice their width, as half precision has them on CUDA."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.kernels.cross_entropy import cross_entropy as kernel
from fastpeft.ops import cross_entropy_triton
from fastpeft.ops.cross_entropy_torch import Terms
from tests.tolerance import assert_bits_equal

BF16 = torch.bfloat16
PLAIN = Terms(-100, 0.0, None, 1.0, 0.0)
pytestmark = pytest.mark.watched


class _Allocated(TorchDispatchMode):
    """Bytes of every storage that `empty` gives."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format:
            self.sizes.append(out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 33])
def test_narrow_gradients_take_the_place_of_wide_logits(m, weighted, device):
    """On CUDA half precision has float32 logits. A quarter of the rows is held apart; what a launch reads it does not write."""
    labels = torch.arange(m, device=device) * 13 % 97
    labels[m // 3] = -100
    logits = cross_entropy_triton.scratch(m, 97, torch.empty(0, device=device))
    logits.copy_(torch.randn(m, 97))
    weights = torch.rand(m, device=device) if weighted else None
    options = {"out": torch.empty(m, 97, dtype=BF16, device=device), "bias": None, "factor": None, "weights": weights}
    want = kernel(logits, labels, **options, **PLAIN._asdict())
    with _Allocated() as made:
        losses, got = cross_entropy_triton.row_losses(logits, labels, None, PLAIN, None, weights, True, BF16)
    assert_bits_equal("losses", losses, want)
    assert_bits_equal("dlogits", got.contiguous(), options["out"])
    assert got.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    assert max(made.sizes) == -(-m // 4) * logits.stride(0) * 2
