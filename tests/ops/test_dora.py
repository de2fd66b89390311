"""dora_linear against the float64 reference: y and every gradient no worse than eager code; what it keeps; the norm."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastpeft.ops.dora import EPS, dora_linear
from fastpeft.ops.dora_torch import row_norm, row_squares
from fastpeft.ops.dropout import LEVELS, keep_mask, threshold_of
from fastpeft.ops.nf4 import quantize_4bit
from fastpeft.reference.dora import dora_linear as reference
from tests.ops.lora_cases import kernels_mask, moved
from tests.saved_bytes import SavedBytes
from tests.tolerance import GRADCHECK, assert_bits_equal, assert_no_worse

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SCALE, SEED = 1.7, 31


@dataclass(frozen=True)
class Case:
    m: int = 33
    n: int = 65
    k: int = 97
    r: int = 5
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype = F32
    layout: str = "rows"
    bias: bool = True
    dropout_p: float = 0.0


def draw(case: Case):
    """(x, w, a, b, magnitude, bias), dy; the adapter changes every row's length by some tens of percent."""
    generator = torch.Generator().manual_seed(case.m * 7919 + case.n)
    normal = lambda *shape, std=1.0: torch.randn(*shape, generator=generator) * std  # noqa: E731
    x = {
        "rows": lambda: normal(case.m, case.k),
        "3d": lambda: normal(3, case.m // 3, case.k),
        "transposed": lambda: normal(case.k, case.m).t(),
    }[case.layout]()
    w = normal(case.k, case.n).t() if case.layout == "transposed" else normal(case.n, case.k)
    a, b = normal(case.r, case.k), normal(case.n, case.r, std=0.3 * case.r**-0.5)
    magnitude = w.norm(dim=1) * (1 + normal(case.n, std=0.2))
    bias = normal(case.n).to(case.dtype) if case.bias else None
    adapter = (t.to(case.adapter_dtype) for t in (a, b, magnitude))
    return (x.to(case.dtype), w.to(case.dtype), *adapter, bias), normal(*x.shape[:-1], case.n).to(case.dtype)


def outcome(function, inputs, dy, dtype=None):
    convert = lambda t: None if t is None else t.detach().to(dtype or t.dtype)  # noqa: E731
    x, w, a, b, magnitude, bias = map(convert, inputs)
    leaves = {"x": x, "a": a, "b": b, "magnitude": magnitude, "bias": bias}
    leaves = {name: leaf.requires_grad_(True) for name, leaf in leaves.items() if leaf is not None}
    y = function(x, w, a, b, magnitude, bias)
    gradients = torch.autograd.grad(y, list(leaves.values()), convert(dy))
    return {"y": y.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, gradients)}}


def eager(case: Case, keep):
    """What PEFT writes: the norm of W + s B A detached, products in x's dtype, the factors of rows in the magnitude's."""

    def function(x, w, a, b, magnitude, bias):
        norm = (w + SCALE * (b @ a).to(w.dtype)).detach().norm(dim=1).clamp_min(EPS)
        dropped = x if keep is None else x * keep.to(x.dtype) / (1 - case.dropout_p)
        low_rank = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype)) * SCALE
        y = (magnitude / norm) * (F.linear(dropped, w) + low_rank)
        if keep is not None:
            y = y + F.linear(x - dropped, w)
        return (y if bias is None else y + bias).to(x.dtype)

    return function


ODD = Case()
CASES = {
    "aligned": Case(64, 32, 48, 8),
    "odd": ODD,
    "wide_and_short": Case(120, 65, 31, 5),  # K < M: the gain goes to the rows of w
    "no_bias": replace(ODD, bias=False),
    "one_row": Case(1, 65, 97, 5),
    "rank_1": Case(33, 65, 97, 1),
    "long_k": Case(20, 33, 2051, 4),
    "3d": replace(ODD, layout="3d"),
    "transposed_x_and_w": replace(ODD, layout="transposed"),
    "bfloat16": replace(ODD, dtype=BF16),
    "bfloat16_all": replace(ODD, dtype=BF16, adapter_dtype=BF16),
    "float16": replace(ODD, dtype=F16),
    "dropout": replace(ODD, dropout_p=0.3),
    "dropout_wide": Case(120, 65, 31, 5, dropout_p=0.3),
    "dropout_bf16_3d_no_bias": replace(ODD, dtype=BF16, layout="3d", bias=False, dropout_p=0.1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_no_worse_than_eager(name, impl):
    check(name, impl, "cpu")


KERNEL_CASES = [
    "aligned",
    "odd",
    "one_row",
    "no_bias",
    "3d",
    "transposed_x_and_w",
    "bfloat16",
    "dropout",
    "dropout_bf16_3d_no_bias",
]


@pytest.mark.watched
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_triton_no_worse_than_eager(name, device, monkeypatch):
    """The wiring of the kernels into autograd; the kernels' own tests have the shapes."""
    monkeypatch.setitem(globals(), "keep_mask", kernels_mask)
    check(name, "triton", device)


def check(name, impl, device):
    case = CASES[name]
    inputs, dy = draw(case)
    inputs, dy = [moved(tensor, device) for tensor in inputs], dy.to(device)
    before = [t.clone() for t in (*inputs, dy) if t is not None]
    threshold = threshold_of(case.dropout_p)
    keep = keep_mask(seed=SEED, like=inputs[0], threshold=threshold).bool() if threshold else None
    call = lambda *t: dora_linear(*t, scale=SCALE, dropout_p=case.dropout_p, seed=SEED, impl=impl)  # noqa: E731
    got = outcome(call, inputs, dy)
    exact = outcome(
        lambda *t: reference(*t, scale=SCALE, dropout_p=threshold / LEVELS, keep=keep), inputs, dy, torch.float64
    )
    plain = outcome(eager(case, keep), inputs, dy)
    for name, want in exact.items():
        assert_no_worse(f"{name} of {impl}", got[name], want, plain[name])
    for was, now in zip(before, (t for t in (*inputs, dy) if t is not None)):
        assert_bits_equal("an input", now, was)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_reference_is_differentiable_but_for_the_norm(dropout_p):
    """The norm is held constant: gradcheck of the formula with the norm taken out agrees, the true derivative does not."""
    inputs, _ = draw(Case(4, 5, 6, 2, dtype=torch.float64, adapter_dtype=torch.float64))
    x, w, a, b, magnitude, bias = (t.requires_grad_(i != 1) for i, t in enumerate(inputs))
    keep = keep_mask(seed=SEED, like=x, threshold=threshold_of(dropout_p)).bool() if dropout_p else None
    options = {"scale": SCALE, "dropout_p": dropout_p, "keep": keep}
    torch.autograd.gradcheck(
        lambda x, m, bias: reference(x, w, a, b, m, bias, **options), (x, magnitude, bias), **GRADCHECK
    )
    norm = (w + SCALE * (b @ a)).detach().norm(dim=1)

    def held(a, b):
        dropped = x if keep is None else x * keep / (1 - dropout_p)
        y = magnitude / norm * (dropped @ (w + SCALE * (b @ a)).mT) + bias
        return y if keep is None else y + (x - dropped) @ w.mT

    y, expected = reference(*inputs, **options), held(a, b)
    for got, want in zip(torch.autograd.grad(y.sum(), (a, b)), torch.autograd.grad(expected.sum(), (a, b))):
        assert_no_worse("d", got, want, want)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_rows_of_zeros_give_zeros(impl):
    """PEFT divides a zero by a zero there: NaN in the output and in every gradient."""
    (x, w, a, b, magnitude, _), dy = draw(ODD)
    w[3], b[3], magnitude[3] = 0, 0, 0
    got = outcome(lambda *t: dora_linear(*t, scale=SCALE, impl=impl), (x, w, a, b, magnitude, None), dy)
    for name, value in got.items():
        assert bool(value.isfinite().all()), name
    assert not got["y"][:, 3].any()
    assert not got["dmagnitude"][3].any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_norm_is_that_of_the_sum(dtype):
    (_, w, a, b, _, _), _ = draw(replace(ODD, dtype=dtype))
    exact = (w.double() + SCALE * (b.double() @ a.double())).norm(dim=1)
    eager = (w + (SCALE * (b @ a)).to(dtype)).float().norm(dim=1)
    assert_no_worse("norm", row_norm(w, a, b, SCALE, row_squares(w)), exact, eager)
    given = dora_linear(*draw(replace(ODD, dtype=dtype))[0], w_sq=row_squares(w), impl="torch")
    assert_bits_equal("y", given, dora_linear(*draw(replace(ODD, dtype=dtype))[0], impl="torch"))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_keeps_x_s_z_and_rows_of_numbers(dtype, base, dropout_p):
    """No mask, no dropped x, no second M x N tensor, and over a quantised base no dense weight: PEFT keeps all of them."""
    case = Case(64, 48, 64, 4, dtype=dtype, dropout_p=dropout_p)
    (x, w, a, b, magnitude, bias), dy = draw(case)
    held = quantize_4bit(w.float()) if base == "nf4" else w
    leaves = [t.requires_grad_(True) for t in (x, a, b, magnitude, bias)]
    with SavedBytes([*leaves, w]) as saved:
        y = dora_linear(x, held, *leaves[1:], scale=SCALE, dropout_p=dropout_p, seed=SEED, impl="torch")
    rows_of_numbers = 2 * case.n * 4  # gain and norm
    assert saved.total() == case.m * (case.r + case.n) * dtype.itemsize + rows_of_numbers, saved.storages()
    y.backward(dy)
    assert saved.total() == 0
    if base == "nf4":
        dense = (x, held.dequantize(dtype), a, b, magnitude, bias)
        expected = outcome(
            lambda *t: dora_linear(*t, scale=SCALE, dropout_p=dropout_p, seed=SEED, impl="torch"), dense, dy
        )
        for name, leaf in zip(("x", "a", "b", "magnitude", "bias"), leaves):
            assert leaf.grad.shape == expected[f"d{name}"].shape


@pytest.mark.parametrize("wanted", ["x", "a", "b", "magnitude", "bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_only_what_is_needed_is_computed(wanted, dropout_p):
    inputs, dy = draw(ODD)
    call = lambda *t: dora_linear(*t, scale=SCALE, dropout_p=dropout_p, seed=SEED, impl="torch")  # noqa: E731
    everything = outcome(call, inputs, dy)
    names = ("x", "w", "a", "b", "magnitude", "bias")
    leaves = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in zip(names, inputs)}
    call(*leaves.values()).backward(dy)
    for name, leaf in leaves.items():
        if name == wanted:
            assert_bits_equal(f"d{name}", leaf.grad, everything[f"d{name}"])
        else:
            assert leaf.grad is None, name


def test_gradient_checkpointing_is_bit_equal():
    inputs, dy = draw(ODD)
    call = lambda *t: dora_linear(*t, scale=SCALE, dropout_p=0.5, impl="torch")  # noqa: E731
    torch.manual_seed(4)
    expected = outcome(call, inputs, dy)
    torch.manual_seed(4)
    for name, got in outcome(lambda *t: checkpoint(call, *t, use_reentrant=False), inputs, dy).items():
        assert_bits_equal(name, got, expected[name])


def test_autocast_and_no_rows():
    inputs, _ = draw(ODD)
    with torch.autocast("cpu", dtype=BF16):
        assert dora_linear(*inputs, scale=SCALE).dtype == BF16
    assert dora_linear(inputs[0][:0], *inputs[1:], scale=SCALE).shape == (0, ODD.n)


def test_second_derivatives_are_refused():
    inputs, _ = draw(ODD)
    a = inputs[2].requires_grad_(True)
    (da,) = torch.autograd.grad(dora_linear(*inputs, impl="torch").square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="dora_linear: expected first-order gradients"):
        da.sum().backward()


BAD = {
    "magnitude_of_another_width": ({"magnitude": torch.ones(7)}, ["magnitude [N=6]", "(7,)"]),
    "no_adapter": ({"a": None, "b": None}, ["a [R, K] and b [N, R]", "None"]),
    "w_sq_of_another_width": ({"w_sq": torch.ones(5)}, ["w_sq [N=6]", "(5,)"]),
    "b_transposed": ({"b": torch.zeros(2, 6)}, ["b (2, 6)", "is b transposed?"]),
    "dropout_one": ({"dropout_p": 1.0}, ["got 1.0"]),
    "trained_w": ({"w": torch.zeros(6, 7, requires_grad=True)}, ["frozen w"]),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(changes, said):
    arguments = {"x": torch.zeros(4, 7), "w": torch.zeros(6, 7), "a": torch.zeros(2, 7), "b": torch.zeros(6, 2)}
    with pytest.raises(ValueError) as caught:
        dora_linear(**(arguments | {"magnitude": torch.ones(6)} | changes))
    assert all(text in str(caught.value) for text in ["dora_linear", *said]), caught.value
