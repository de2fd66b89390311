"""RMSNorm and LayerNorm of both implementations against float64: values, every gradient, dtypes, refusals."""

from dataclasses import replace

import pytest
import torch

from fastpeft.ops import norm_torch
from fastpeft.ops.norm import layer_norm, rms_norm
from tests.ops.norm_cases import BF16, DTYPES, FP16, FP32, SHAPES, VARIANTS, Variant, call, draw, in_dtype, run
from tests.saved_bytes import SavedBytes
from tests.tolerance import GRADCHECK, assert_bits_equal, assert_no_worse

EACH_IMPL = pytest.mark.parametrize("impl", ["torch", "triton"])
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
BOTH_NORMS = pytest.mark.parametrize("variant", [VARIANTS["rms-offset-residual"], VARIANTS["layer-residual"]], ids=str)

pytestmark = pytest.mark.watched


def assert_all_no_worse(got, exact, eager):
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_no_worse(name, value, exact[name], eager[name])


# every dtype on the odd shape, every shape in the dtypes that convert most
CASES = [("odd", dtypes) for dtypes in DTYPES] + [(shape, "bf16-fp32") for shape in SHAPES if shape != "odd"]


@EACH_IMPL
@EACH_VARIANT
@pytest.mark.parametrize(("shape", "dtypes"), CASES)
def test_no_worse_than_eager(shape, dtypes, variant, impl, device):
    inputs, grads = draw(variant, SHAPES[shape], *DTYPES[dtypes], device)
    eager = in_dtype(None, variant, inputs, grads)
    assert_all_no_worse(run(variant, inputs, grads, impl=impl), in_dtype(torch.float64, variant, inputs, grads), eager)


@EACH_IMPL
@pytest.mark.parametrize(("x_dtype", "dtype"), [(BF16, FP32), (FP32, BF16)], ids=["to-fp32", "to-bf16"])
def test_y_in_another_dtype(x_dtype, dtype, impl, device):
    """What a norm of float32 weights over bfloat16 gives in transformers: one rounding, and no wide copy of x is kept."""
    variant = VARIANTS["rms"]
    inputs, grads = draw(variant, SHAPES["odd"], x_dtype, FP32, device, dtype=dtype)
    got = run(variant, inputs, grads, impl=impl, dtype=dtype)
    assert got["y"].dtype == dtype
    assert got["dx"].dtype == x_dtype
    eager = run(variant, inputs, grads, impl="reference", dtype=dtype)
    assert_all_no_worse(got, in_dtype(torch.float64, variant, inputs, grads), eager)


@EACH_IMPL
@BOTH_NORMS
def test_strided_x_and_gradients(variant, impl, device):
    """Heads before tokens, columns apart, rows of stride zero."""
    inputs, grads = draw(variant, (2, 5, 3, 24), FP32, FP32, device)
    expected = run(variant, inputs, grads, impl=impl)
    inputs["x"] = inputs["x"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    inputs["residual"] = inputs["residual"].detach().transpose(0, 3).contiguous().transpose(0, 3).requires_grad_()
    inputs["weight"] = inputs["weight"].detach().repeat_interleave(2)[::2].requires_grad_()
    grads = [grads[0].transpose(2, 3).contiguous().transpose(2, 3), grads[1]]
    for name, value in run(variant, inputs, grads, impl=impl).items():
        assert_bits_equal(name, value, expected[name])
    inputs["x"] = inputs["x"].detach()[:, :1].expand(-1, 5, -1, -1).requires_grad_()
    got = run(variant, inputs, [grads[0], grads[1][:1].expand(2, -1, -1, -1)], impl=impl)
    exact = in_dtype(torch.float64, variant, inputs, [grads[0], grads[1][:1].expand(2, -1, -1, -1)])
    assert_all_no_worse(got, exact, {name: value.float() for name, value in exact.items()})


@EACH_IMPL
@BOTH_NORMS
def test_only_what_needs_a_gradient_gets_one(variant, impl, device):
    inputs, grads = draw(variant, SHAPES["odd"], FP32, FP32, device)
    everything = run(variant, inputs, grads, impl=impl)
    for wanted in inputs:
        alone = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in inputs.items()}
        outputs = call(variant, alone, impl=impl)
        torch.autograd.backward(
            outputs if outputs[1].requires_grad else outputs[:1], grads[: 1 + outputs[1].requires_grad]
        )
        assert_bits_equal(wanted, alone[wanted].grad, everything[f"d{wanted}"])
        assert all(tensor.grad is None for name, tensor in alone.items() if name != wanted)
    assert not call(variant, {name: tensor.detach() for name, tensor in inputs.items()}, impl=impl)[0].requires_grad


@EACH_IMPL
@BOTH_NORMS
def test_a_gradient_of_y_or_of_h_alone(variant, impl, device):
    inputs, grads = draw(variant, SHAPES["odd"], FP32, FP32, device)
    nothing = torch.zeros_like(grads[0])
    y_alone = torch.autograd.grad(call(variant, inputs, impl=impl)[0], list(inputs.values()), grads[0])
    for got, want in zip(y_alone, list(run(variant, inputs, [grads[0], nothing], impl=impl).values())[2:]):
        assert_bits_equal("gradient through y", got + 0.0, want + 0.0)
    x, residual = inputs["x"], inputs["residual"]
    for grad in torch.autograd.grad(call(variant, inputs, impl=impl)[1], (x, residual), grads[1]):
        assert_bits_equal("gradient through h", grad, grads[1])


@EACH_IMPL
@pytest.mark.parametrize("x_dtype", [BF16, FP32], ids=str)
@BOTH_NORMS
def test_what_is_normalised_is_the_h_that_is_returned(variant, x_dtype, impl, device):
    """h is rounded first, as a decoder layer's own sum is: y and its gradients are those of a call on h, bit for bit."""
    inputs, grads = draw(variant, SHAPES["odd"], x_dtype, x_dtype, device)
    fused = run(variant, inputs, [grads[0], torch.zeros_like(grads[1])], impl=impl)
    assert_bits_equal("h", fused["h"], (inputs["x"] + inputs["residual"]).detach())
    plain = replace(variant, residual=False)
    alone = {name: tensor for name, tensor in inputs.items() if name != "residual"}
    alone["x"] = fused["h"].clone().requires_grad_()
    for name, value in run(plain, alone, grads[:1], impl=impl).items():
        assert_bits_equal(name, fused[name] + 0.0, value + 0.0)


@EACH_IMPL
@EACH_VARIANT
def test_inputs_stay_and_two_backwards_agree(variant, impl, device):
    inputs, grads = draw(variant, SHAPES["odd"], BF16, FP32, device)
    before = [tensor.detach().clone() for tensor in (*inputs.values(), *grads)]
    outputs = call(variant, inputs, impl=impl)
    first = torch.autograd.grad(outputs, list(inputs.values()), grads, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(outputs, list(inputs.values()), grads)):
        assert_bits_equal("gradient", one, other)
    for one, other in zip((*inputs.values(), *grads), before):
        assert_bits_equal("an input", one.detach(), other)


@EACH_IMPL
def test_a_row_of_zeros_and_a_large_mean(impl, device):
    """The mean is taken off before squares are summed: 1000 with a deviation of 1 keeps its digits."""
    x = (torch.randn(5, 97) + 1000).to(device)
    x[2] = 0
    variant = VARIANTS["layer"]
    inputs, grads = draw(variant, (5, 97), FP32, FP32, device)
    inputs["x"] = x.requires_grad_()
    exact, eager = in_dtype(torch.float64, variant, inputs, grads), in_dtype(None, variant, inputs, grads)
    assert_all_no_worse(run(variant, inputs, grads, impl=impl), exact, eager)


def test_gradients_in_float64():
    for variant in (
        Variant(offset=1.0, residual=True, eps=0.1),
        Variant(centred=True, bias=True, residual=True, eps=0.1),
    ):
        inputs, _ = draw(variant, (3, 5), torch.float64, torch.float64, "cpu")

        def value(*tensors, variant=variant, names=tuple(inputs)):
            return tuple(call(variant, dict(zip(names, tensors)), impl="torch"))

        assert torch.autograd.gradcheck(value, tuple(inputs.values()), **GRADCHECK)


@EACH_IMPL
@pytest.mark.parametrize("x_dtype", [BF16, FP16, FP32], ids=str)
@BOTH_NORMS
def test_what_is_kept_for_backward(variant, x_dtype, impl, device):
    """h in its own dtype, and one or two float32 numbers a row."""
    inputs, _ = draw(variant, (7, 96), x_dtype, FP32, device)
    with SavedBytes(inputs.values()) as saved:
        outputs = call(variant, inputs, impl=impl)
    numbers = 2 if variant.centred else 1
    assert saved.total() == outputs[1].numel() * x_dtype.itemsize + 7 * numbers * 4


@EACH_IMPL
@BOTH_NORMS
def test_an_empty_batch(variant, impl, device):
    inputs, grads = draw(variant, (2, 0, 33), FP32, BF16, device)
    got = run(variant, inputs, grads, impl=impl)
    assert got["y"].shape == got["dx"].shape == (2, 0, 33)
    assert_bits_equal("dweight", got["dweight"], torch.zeros(33, dtype=BF16))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["rms", "rms-bare", "rms-offset"])
def test_few_rows_without_a_gradient(name, dtypes, monkeypatch):
    """A token of generation goes to PyTorch's rms_norm: as accurate as the rest, on both sides of the limit."""
    variant = VARIANTS.get(name, Variant(offset=1.0))
    inputs, _ = draw(variant, (3, 65), *dtypes, "cpu")
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    exact = call(variant, {name: tensor.double() for name, tensor in inputs.items()}, impl="reference")[0]
    eager = call(variant, inputs, impl="reference")[0]
    few = call(variant, inputs, impl="torch")[0]
    assert_no_worse("few", few, exact, eager)
    monkeypatch.setattr(norm_torch, "_SMALL", 3 * 65 - 1)
    with monkeypatch.context() as forbidden:
        forbidden.setattr(norm_torch, "small_rms_norm", None)
        assert_no_worse("many", call(variant, inputs, impl="torch")[0], exact, eager)


def test_a_weight_gradient_is_the_sum_of_chunks():
    """The CPU's code takes 2^17 elements at a time; five chunks, the last of them short."""
    variant = VARIANTS["rms-offset-residual"]
    inputs, grads = draw(variant, (601, 1001), BF16, BF16, "cpu")
    exact, eager = in_dtype(torch.float64, variant, inputs, grads), in_dtype(None, variant, inputs, grads)
    assert_all_no_worse(run(variant, inputs, grads, impl="torch"), exact, eager)


def ones(*shape, dtype=FP32, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ones(2, 3, dtype=torch.int64)}, r"floating x \[..., K\].*int64"),
        ({"x": ones(2, 0)}, r"K > 0, got \(2, 0\)"),
        ({"eps": -1e-6}, "eps of zero or more, got -1e-06"),
        ({"residual": ones(3)}, r"residual \(2, 3\) torch.float32 as x, got \(3,\)"),
        ({"residual": ones(2, 3, dtype=BF16)}, "got .* torch.bfloat16"),
        ({"weight": ones(4)}, r"weight \[K=3\], got \(4,\)"),
        ({"weight": ones(3, device="meta")}, "weight on cpu as x, got meta"),
        ({"bias": ones(1)}, r"bias \[K=3\], got \(1,\)"),
        ({"impl": "fast"}, "'fast'"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": ones(2, 3), "weight": ones(3), "bias": ones(3), "eps": 1e-6} | change
    with pytest.raises(ValueError, match=message) as caught:
        layer_norm(**arguments)
    assert "\n" not in str(caught.value)
    if "bias" in change:
        return
    arguments.pop("bias")
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments)
