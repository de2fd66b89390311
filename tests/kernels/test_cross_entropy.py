"""The cross-entropy kernel: bytes against the closed form, buffers, strides. More values: tests/ops/test_cross_entropy.py."""

import pytest
import torch

from fastpeft.kernels import cross_entropy as kernels
from tests.ops.cross_entropy_cases import TERMS
from tests.tolerance import assert_bits_equal, assert_no_worse

OPTIONS = {"ignore_index": -100, "softcap": None, "logit_scale": 1.0, "label_smoothing": 0.0, "z_loss": 0.0}
ALL = OPTIONS | TERMS["all"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Two whole blocks and a rest for a hundred columns or so."""
    monkeypatch.setattr(kernels, "_BLOCK", 32)
    tile = kernels._tile

    def small(v, target):
        config = tile(v, target)
        return type(config)(1, 32, 1, 1, num_warps=1, num_stages=config.num_stages)

    monkeypatch.setattr(kernels, "_tile", small)


def draw(m, v, dtype, device):
    logits = (3 * torch.randn(m, v)).to(device, dtype)
    labels = torch.randint(0, v, (m,), device=device)
    labels[1::3] = -100
    return logits, labels


def formula(logits, labels, dtype, softcap, logit_scale, label_smoothing, z_loss, factor=1.0, **_):
    """losses and the gradient of factor * their sum."""
    logits = logits.detach().to(dtype).requires_grad_()
    z = logit_scale * logits
    z = softcap * torch.tanh(z / softcap) if softcap else z
    losses = torch.nn.functional.cross_entropy(z, labels, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * torch.where(labels == -100, 0, z.logsumexp(-1).square())
    return losses.detach(), torch.autograd.grad(losses.sum() * factor, logits)[0]


@pytest.mark.parametrize("terms", [OPTIONS, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("v", [64, 97, 31])
def test_float32_logits_give_a_gradient_of_another_dtype(v, terms, small_blocks, device):
    """As on CUDA: logits unrounded, dlogits in the dtype of x."""
    logits, labels = draw(7, v, torch.float32, device)
    factor = torch.tensor(0.25, device=device)
    out = torch.empty(7, v, dtype=torch.bfloat16, device=device)
    before = logits.clone()
    losses = kernels.cross_entropy(logits, labels, out=out, factor=factor, **terms)
    assert_bits_equal("logits", logits, before)
    exact = formula(logits, labels, torch.float64, factor=0.25, **terms)
    eager = formula(logits, labels, torch.float32, factor=0.25, **terms)
    assert_no_worse("losses", losses, exact[0], eager[0])
    assert_no_worse("dlogits", out, exact[1], eager[1].bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_gradient_may_stand_in_the_place_of_the_logits(dtype, small_blocks, device):
    logits, labels = draw(7, 97, dtype, device)
    apart = torch.empty_like(logits)
    expected = kernels.cross_entropy(logits, labels, out=apart, **ALL)
    alone = kernels.cross_entropy(logits, labels, out=None, **ALL)
    losses = kernels.cross_entropy(logits, labels, out=logits, **ALL)
    assert_bits_equal("losses", losses, expected)
    assert_bits_equal("losses without a gradient", alone, expected)
    assert_bits_equal("dlogits", logits, apart)


def test_rows_apart(small_blocks, device):
    """The op's scratch has rows at multiples of 16 bytes; what lies between them stays."""
    logits, labels = draw(5, 97, torch.float32, device)
    scratch = torch.full((5, kernels.padded(97)), 7.0, device=device)
    assert scratch.shape[1] == 128
    scratch[:, :97] = logits
    expected = torch.empty_like(logits)
    kernels.cross_entropy(logits, labels, out=expected, **OPTIONS)
    kernels.cross_entropy(scratch[:, :97], labels, out=scratch[:, :97], **OPTIONS)
    assert_bits_equal("dlogits", scratch[:, :97].contiguous(), expected)
    assert scratch[:, 97:].eq(7.0).all()


@pytest.mark.parametrize("v", [96, 97])
@pytest.mark.parametrize("gradient", [True, False])
def test_logits_are_read_once_for_each_pass(gradient, v, small_blocks, probe, device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")
    logits, labels = draw(6, v, torch.float32, device)
    out = torch.empty(6, v, dtype=torch.bfloat16) if gradient else None
    kernels.cross_entropy(logits, labels, out=out, **OPTIONS)
    (once,) = probe.launches
    kept = int((labels != -100).sum())
    expected = {
        ("labels_ptr", "load"): 6 * 8,
        ("logits_ptr", "load"): kept * ((2 if gradient else 1) * v + 1) * 4,
        ("losses_ptr", "store"): 6 * 4,
    }
    if gradient:
        expected["out_ptr", "store"] = 6 * v * 2
    assert once.asked == expected


def test_rows_that_are_ignored_are_not_read(device):
    logits, labels = torch.full((3, 40), float("nan"), device=device), torch.full((3,), 7, device=device)
    losses = kernels.cross_entropy(logits, labels, out=logits, **OPTIONS | {"ignore_index": 7})
    assert not losses.any()
    assert not logits.any()


def test_large_logits_do_not_overflow(device):
    logits = torch.tensor([[3e4, 2.9e4, -3e4], [-3e4, -3e4, -3e4]], device=device)
    labels = torch.tensor([1, 0], device=device)
    losses = kernels.cross_entropy(logits, labels, out=logits, **OPTIONS)
    exact = torch.tensor([1e3, torch.log(torch.tensor(3.0))], dtype=torch.float64)
    assert_no_worse("losses", losses, exact, exact.float())
