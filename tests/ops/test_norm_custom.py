"""Citizenship of the norms: torch.library, torch.compile, fake and meta tensors, torch.func, autocast, checkpointing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastpeft.ops.norm import rms_norm
from tests.ops.norm_cases import BF16, FP32, VARIANTS, call, draw, run
from tests.ops.test_no_sync import CountReads
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

SHAPE = (2, 5, 33)
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
EACH_IMPL = pytest.mark.parametrize("impl", ["torch", "triton"])
BOTH_NORMS = pytest.mark.parametrize("variant", [VARIANTS["rms-offset-residual"], VARIANTS["layer-residual"]], ids=str)


@EACH_IMPL
@EACH_VARIANT
@pytest.mark.watched
def test_opcheck(variant, impl, device):
    from fastpeft.ops import norm_custom

    inputs, _ = draw(variant, SHAPE, BF16, FP32, device)
    tensors = [inputs.get(name) for name in ("x", "residual", "weight", "bias")]
    arguments = (*tensors, 1e-5, variant.offset, variant.centred, BF16, impl)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if impl == "torch":
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(norm_custom.norm, arguments, test_utils=tests)


@pytest.mark.parametrize("needs", [[True] * 3, [False] * 3, [True, False, True], [False, True, False]], ids=str)
def test_opcheck_of_backward(needs):
    from fastpeft.ops import norm_custom

    h, w, bias = torch.randn(*SHAPE), torch.randn(33), torch.randn(33)
    y, _, mean, rstd = norm_custom.norm(h, None, w, bias, 1e-5, 0.0, True, FP32, "torch")
    arguments = (torch.randn_like(y), h, h, w, mean, rstd, 0.0, BF16, needs, "torch")
    torch.library.opcheck(norm_custom.norm_backward, arguments, test_utils=("test_schema", "test_faketensor"))
    arguments = (torch.randn_like(y), None, h, w, None, rstd, 1.0, None, [*needs[:2], False], "torch")
    torch.library.opcheck(norm_custom.norm_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@EACH_VARIANT
def test_compile_has_no_break_and_the_same_bits(variant):
    torch.compiler.reset()
    inputs, grads = draw(variant, SHAPE, BF16, BF16, "cpu")
    compiled = torch.compile(lambda inputs: call(variant, inputs), fullgraph=True, backend="aot_eager")
    outputs = compiled(inputs)
    expected = run(variant, inputs, grads, impl="torch")
    got = [*outputs, *torch.autograd.grad(outputs, list(inputs.values()), grads)]
    for (name, want), value in zip(expected.items(), got, strict=True):
        assert_bits_equal(name, value.detach(), want)


@EACH_IMPL
@EACH_VARIANT
def test_a_step_is_traced_on_fake_tensors(variant, impl):
    with FakeTensorMode():
        inputs, grads = draw(variant, SHAPE, BF16, FP32, "cpu")
        got = run(variant, inputs, grads, impl=impl)
    given = {f"d{name}": tensor for name, tensor in inputs.items()}
    for name, value in got.items():
        like = given.get(name, inputs["x"])
        assert (value.shape, value.dtype) == (like.shape, like.dtype)


@BOTH_NORMS
def test_meta_tensors_give_shapes(variant):
    inputs, grads = draw(variant, SHAPE, FP32, FP32, "meta")
    got = run(variant, inputs, grads)
    assert all(value.is_meta for value in got.values())
    assert got["dx"].shape == SHAPE
    assert rms_norm(torch.ones(2, 3, device="meta"), None, eps=1e-6, dtype=BF16).dtype == BF16


@BOTH_NORMS
def test_torch_func_is_not_broken(variant):
    inputs, _ = draw(variant, SHAPE, FP32, FP32, "cpu")
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    grad = torch.func.grad(lambda x: call(variant, inputs | {"x": x})[0].square().sum())(inputs["x"])
    x = inputs["x"].clone().requires_grad_()
    (want,) = torch.autograd.grad(call(variant, inputs | {"x": x})[0].square().sum(), x)
    assert_close("dx", grad, want, OTHER_ORDER_OF_SUMS)


@EACH_IMPL
@BOTH_NORMS
@pytest.mark.watched
def test_autocast_changes_nothing(variant, impl, device):
    """Neither forward nor, where it is still on, backward."""
    inputs, grads = draw(variant, SHAPE, FP32, FP32, device)
    expected = run(variant, inputs, grads, impl=impl)
    with torch.autocast(device.type, dtype=BF16):
        got = run(variant, inputs, grads, impl=impl)
    for name, value in got.items():
        assert_bits_equal(name, value, expected[name])


@pytest.mark.parametrize("reentrant", [False, True])
@BOTH_NORMS
def test_checkpointing(variant, reentrant):
    inputs, grads = draw(variant, SHAPE, BF16, BF16, "cpu")
    expected = run(variant, inputs, grads)

    def again(*tensors):
        return tuple(call(variant, dict(zip(inputs, tensors))))

    torch.autograd.backward(checkpoint(again, *inputs.values(), use_reentrant=reentrant), grads)
    for name, tensor in inputs.items():
        assert_bits_equal(name, tensor.grad, expected[f"d{name}"])


@EACH_IMPL
@BOTH_NORMS
@pytest.mark.watched
def test_inference_mode_and_no_grad_give_the_same_bits(variant, impl, device):
    inputs, _ = draw(variant, SHAPE, BF16, BF16, device)
    expected = call(variant, inputs, impl=impl)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            for got, want in zip(call(variant, inputs, impl=impl), expected):
                assert_bits_equal("output", got, want.detach())


@EACH_IMPL
@BOTH_NORMS
@pytest.mark.watched
def test_a_second_differentiation_is_refused_by_name(variant, impl, device):
    inputs, _ = draw(variant, SHAPE, FP32, FP32, device)
    y = call(variant, inputs, impl=impl)[0]
    first = torch.autograd.grad(y.square().sum(), list(inputs.values()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"norm: expected first-order gradients.*impl='reference'"):
        first[0].sum().backward()


@EACH_IMPL
@BOTH_NORMS
@pytest.mark.watched
def test_no_value_is_read(variant, impl, device):
    inputs, grads = draw(variant, SHAPE, BF16, FP32, device)
    with CountReads() as counted:
        run(variant, inputs, grads, impl=impl)
    assert not counted.reads
