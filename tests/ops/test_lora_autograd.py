"""lora_linear under autograd: what it keeps, what it computes, repeated and recomputed backwards, dropout, autocast."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastpeft.ops.lora import lora_linear
from fastpeft.reference import lora as reference
from tests.ops.lora_cases import BF16, F32, SCALE, SEED, VARIANTS, Case, Inputs, choose, draw, eager, results
from tests.saved_bytes import SavedBytes
from tests.tolerance import KEEP_RATE_SIGMAS, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, assert_no_worse

ODD = Case(33, 65, 97, 5)


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [
        *product(["torch", "composed", "reference"], ["x", "a", "b", "bias", "ab", "xbias"]),
        *product(["triton"], ["a", "xbias"]),  # two combinations say it; the interpreter is slow
    ],
)
def test_only_what_is_needed_is_computed(variant, wanted, device, monkeypatch):
    """A frozen A, a frozen B, an input without a gradient: the rest is the same as when all are asked for."""
    impl, m = choose(monkeypatch, variant), 17
    inputs = draw(Case(m, 10, 12, 3, dropout_p=0.25), device)
    call = lambda *t: lora_linear(*t, scale=SCALE, dropout_p=0.25, seed=SEED, impl=impl)  # noqa: E731
    full = results(call, inputs)
    names = {"x": inputs.x, "a": inputs.a, "b": inputs.b, "bias": inputs.bias}
    chosen = ["a", "b"] if wanted == "ab" else ["x", "bias"] if wanted == "xbias" else [wanted]
    leaves = {name: tensor.detach().requires_grad_(name in chosen) for name, tensor in names.items()}
    y = call(leaves["x"], inputs.w, leaves["a"], leaves["b"], leaves["bias"])
    y.backward(inputs.dy)
    for name, leaf in leaves.items():
        if name in chosen:
            _assert_same(impl, f"d{name}", leaf.grad, full[f"d{name}"])
        else:
            assert leaf.grad is None, name


def _assert_same(impl: str, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit; the kernels take dS by another kernel where db is not asked for."""
    if impl == "triton":
        assert_close(name, got, expected, OTHER_ORDER_OF_SUMS)
    else:
        assert_bits_equal(name, got, expected)


def test_one_gradient_at_a_time_of_the_same_graph(device, monkeypatch):
    """torch.autograd.grad for a alone must not need what only b needs."""
    choose(monkeypatch, "torch")
    inputs = draw(ODD, device)
    leaves = [t.detach().requires_grad_(True) for t in (inputs.x, inputs.a, inputs.b, inputs.bias)]
    y = lora_linear(leaves[0], inputs.w, *leaves[1:], impl="torch")
    together = torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)
    for leaf, expected in zip(leaves, together):
        (alone,) = torch.autograd.grad(y, [leaf], inputs.dy, retain_graph=True)
        assert_bits_equal("alone", alone, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_backwards_are_equal(variant, device, monkeypatch):
    """The saved tensors are not written to, and the dropout mask is drawn again the same."""
    impl, m = choose(monkeypatch, variant), 17
    inputs = draw(Case(m, 10, 12, 3), device)
    leaves = [t.detach().requires_grad_(True) for t in (inputs.x, inputs.a, inputs.b, inputs.bias)]
    y = lora_linear(leaves[0], inputs.w, *leaves[1:], scale=SCALE, dropout_p=0.25, seed=SEED, impl=impl)
    first = torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(y, leaves, inputs.dy)):
        assert_bits_equal("second backward", two, one)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_with_zero_strides(variant, device, monkeypatch):
    """y.sum() hands backward an expanded scalar, whose strides are zero."""
    impl = choose(monkeypatch, variant)
    inputs = replace(draw(Case(17, 10, 12, 3), device), dy=torch.ones(17, 10, device=device))
    dense = results(lambda *t: lora_linear(*t, impl=impl), inputs)
    expanded = replace(inputs, dy=torch.ones((), device=device).expand(17, 10))
    for name, value in results(lambda *t: lora_linear(*t, impl=impl), expanded).items():
        assert_bits_equal(name, value, dense[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_autograd(variant, device, monkeypatch):
    impl, m = choose(monkeypatch, variant), 17
    inputs = draw(Case(m, 10, 12, 3), device)
    call = lambda: lora_linear(*(t.detach().requires_grad_(i == 2) for i, t in enumerate(inputs.tensors())), impl=impl)  # noqa: E731
    expected = call()
    assert expected.requires_grad
    with torch.no_grad():
        y = call()
    assert not y.requires_grad
    assert_bits_equal("no_grad", y, expected)
    with torch.inference_mode():
        assert_bits_equal("inference_mode", call().clone(), expected)


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_follows_the_seed(variant, device, monkeypatch):
    impl, m = choose(monkeypatch, variant), 17
    x, w, a, b, bias = draw(Case(m, 10, 12, 3), device).tensors()
    call = lambda **options: lora_linear(x, w, a, b, bias, dropout_p=0.5, impl=impl, **options)  # noqa: E731
    assert_bits_equal("same seed", call(seed=5), call(seed=5))
    assert not torch.equal(call(seed=5), call(seed=6))
    torch.manual_seed(3)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert_bits_equal("torch.manual_seed", call(), first)


def test_no_dropout_draws_no_random_numbers():
    x, w, a, b, bias = draw(ODD, "cpu").tensors()
    before = torch.get_rng_state()
    lora_linear(x, w, a, b, bias)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_leaves_the_base_product_and_the_mean_alone():
    """With x = 1 and a = 1 / K each output is the kept share over 1 - p: its mean over rows is 1."""
    m, k, p = 4096, 256, 0.25
    x, w = torch.ones(m, k), torch.zeros(1, k)
    y = lora_linear(x, w, torch.full((1, k), 1 / k), torch.ones(1, 1), dropout_p=p)
    kept_share = y.double().mean().item() * (1 - p)
    sigma = (p * (1 - p) / (m * k)) ** 0.5
    assert abs(kept_share - (1 - p)) < KEEP_RATE_SIGMAS * sigma


# -- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=["fp32_x", "bf16_x"])
@pytest.mark.parametrize("variant", ["torch", "composed", "reference"])
def test_autocast_is_that_of_linear(variant, x_dtype, monkeypatch):
    """y in the autocast dtype with the values of bf16 operands; gradients come back in their own dtypes."""
    impl = choose(monkeypatch, variant)
    inputs = draw(ODD, "cpu")
    leaves = [inputs.x.to(x_dtype).requires_grad_(True)]
    leaves += [t.detach().requires_grad_(True) for t in (inputs.a, inputs.b, inputs.bias)]
    with torch.autocast("cpu", dtype=BF16):
        linear = F.linear(leaves[0], inputs.w, inputs.bias)
        y = lora_linear(leaves[0], inputs.w, *leaves[1:], scale=SCALE, impl=impl)
    assert y.dtype == linear.dtype == BF16
    gradients = torch.autograd.grad(y, leaves, inputs.dy.to(BF16))
    assert [g.dtype for g in gradients] == [x_dtype, F32, F32, F32]
    half = Inputs(*(t.to(BF16) for t in (inputs.x, inputs.w, inputs.a, inputs.b, inputs.bias, inputs.dy)))
    exact = results(lambda *t: reference.lora_linear(*t, scale=SCALE), half, dtype=torch.float64)
    plain = results(lambda x, *t: eager(x, *t, x), half)
    assert_no_worse("y", y.detach(), exact["y"], plain["y"])
    for name, gradient in zip(("dx", "da", "db", "dbias"), gradients):
        assert_no_worse(name, gradient.to(BF16), exact[name], plain[name])


def test_autocast_leaves_float64_alone():
    """F.linear under autocast does not touch float64, for use as an oracle."""
    inputs = [t.double() for t in draw(ODD, "cpu").tensors()]
    with torch.autocast("cpu", dtype=BF16):
        assert lora_linear(*inputs).dtype == torch.float64


def test_second_derivatives_are_refused(monkeypatch):
    """First order only: a second derivative is refused instead of being wrong."""
    choose(monkeypatch, "torch")
    inputs = draw(ODD, "cpu")
    a = inputs.a.requires_grad_(True)
    y = lora_linear(inputs.x.requires_grad_(True), inputs.w, a, inputs.b, impl="torch")
    (da,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        da.sum().backward()


# -- recomputed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_gradient_checkpointing_is_bit_equal(variant, use_reentrant, device, monkeypatch):
    """The forward pass that backward repeats draws the same seed: torch replays its CPU generator."""
    impl, m = choose(monkeypatch, variant), 17
    inputs = draw(Case(m, 10, 12, 3), device)

    def gradients(recompute):
        leaves = [t.detach().requires_grad_(True) for t in (inputs.x, inputs.a, inputs.b, inputs.bias)]
        call = lambda x, a, b, bias: lora_linear(x, inputs.w, a, b, bias, dropout_p=0.5, impl=impl)  # noqa: E731
        torch.manual_seed(21)
        y = checkpoint(call, *leaves, use_reentrant=use_reentrant) if recompute else call(*leaves)
        y.backward(inputs.dy)
        return [y, *(leaf.grad for leaf in leaves)]

    for got, expected in zip(gradients(recompute=True), gradients(recompute=False)):
        assert_bits_equal("recomputed", got, expected)


# -- kept for backward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize(
    ("impl", "layout", "dtype"),
    [
        *product(["torch"], ["rows", "3d", "strided", "transposed", "conv1d"], [F32, BF16]),
        ("triton", "rows", F32),  # two combinations say it; the interpreter is slow
        ("triton", "transposed", BF16),
    ],
)
def test_keeps_x_as_it_came_and_s(impl, dtype, layout, dropout_p, device, monkeypatch):
    """No dropped or float32 or contiguous copy of x, nothing of w's size, a mask's bits at most: PEFT keeps all of these."""
    choose(monkeypatch, impl)
    m, n, k, r = 64, 48, 40, 4
    inputs = draw(Case(m, n, k, r, dtype=dtype, adapter_dtype=F32, layout=layout), device)
    x, w, a, b, bias = (tensor.requires_grad_(tensor is not inputs.w) for tensor in inputs.tensors())
    with SavedBytes([x, w, a, b, bias]) as saved:
        y = lora_linear(x, w, a, b, bias, scale=SCALE, dropout_p=dropout_p, seed=SEED, impl=impl)
    columns = r if impl == "torch" else 16  # the kernels pad S to 16 columns
    assert saved.total() == m * columns * dtype.itemsize, saved.storages()
    assert saved.beside() == (m * k // 8 if dropout_p and impl == "torch" and device.type == "cpu" else 0)
    y.sum().backward()
    assert saved.total() + saved.beside() == 0


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_frozen_adapters_keep_nothing(impl, device, monkeypatch):
    """A second, frozen adapter on the way of the gradient needs neither x nor S again."""
    choose(monkeypatch, impl)
    inputs = draw(Case(17, 10, 12, 3), device)
    x = inputs.x.requires_grad_(True)
    with SavedBytes([x, inputs.w, inputs.a, inputs.b, inputs.bias]) as saved:
        y = lora_linear(x * 1.0, inputs.w, inputs.a, inputs.b, inputs.bias, dropout_p=0.25, seed=SEED, impl=impl)
    assert saved.total() == 0, saved.storages()
    _assert_same(impl, "dx", torch.autograd.grad(y, x, inputs.dy)[0], _dx_of_trained(inputs, impl))


def _dx_of_trained(inputs: Inputs, impl: str) -> torch.Tensor:
    leaves = [t.detach().requires_grad_(True) for t in (inputs.x, inputs.a, inputs.b)]
    y = lora_linear(leaves[0], inputs.w, *leaves[1:], inputs.bias, dropout_p=0.25, seed=SEED, impl=impl)
    return torch.autograd.grad(y, leaves[0], inputs.dy)[0]


def test_triton_refuses_float64(device):
    """float64 is asked for to be exact: kernels that sum in float32 must not answer."""
    inputs = [t.double() for t in draw(Case(17, 10, 12, 3), device).tensors()]
    with pytest.raises(NotImplementedError, match="float64"):
        lora_linear(*inputs, impl="triton")
