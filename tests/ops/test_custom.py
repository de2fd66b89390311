"""Citizenship of lora_linear: torch.library, torch.compile, fake and meta tensors, torch.func, checkpointing, inference."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastpeft.ops.lora import lora_linear
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

M, N, K, R = 34, 24, 64, 5
SCALE = 1.5
BASES = ["dense", "nf4", "nf4_double", "int8"]


def weight(base: str, device="cpu"):
    w = torch.randn(N, K, device=device)
    if base == "dense":
        return w
    if base == "int8":
        from fastpeft.ops.int8 import quantize_int8

        return quantize_int8(w)
    from fastpeft.ops.nf4 import quantize_4bit

    return quantize_4bit(w, double_quant=base.endswith("double"))


def trained(device="cpu"):
    """x [2, M/2, K], a, b, bias, all wanting gradients."""
    shapes = [(2, M // 2, K), (R, K), (N, R), (N,)]
    return [torch.randn(*shape, device=device).requires_grad_() for shape in shapes]


def call(inputs, w, **options):
    x, a, b, bias = inputs
    return lora_linear(x, w, a, b, bias, scale=SCALE, **options)


def gradients(y, inputs):
    return torch.autograd.grad(y.square().sum(), inputs)


@pytest.mark.parametrize("dropout", [False, True], ids=["whole", "dropout"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.watched
def test_opcheck(impl, base, dropout, device):
    from fastpeft.ops import custom

    x, a, b, bias = trained(device)
    tensors, described = custom.flatten(weight(base, device))
    seed = torch.tensor(7) if dropout else None
    threshold = 20000 if dropout else 0
    arguments = (x, tensors, a, b, bias, seed, SCALE, threshold, described, impl)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if impl == "torch":  # traces a second time, which costs the interpreter seconds and shows nothing new
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(custom.lora_linear, arguments, test_utils=tests)


def test_opcheck_of_backward_and_seed():
    from fastpeft.ops import custom

    x, a, b, bias = (tensor.detach() for tensor in trained())
    tensors, described = custom.flatten(weight("dense"))
    arguments = (
        torch.randn(2, M // 2, N),
        x,
        torch.randn(M, R),
        tensors,
        a,
        b,
        bias,
        None,
        SCALE,
        0,
        described,
        "torch",
    )
    for needs in ([True] * 4, [False] * 4, [True, False, True, False]):
        torch.library.opcheck(custom.lora_linear_backward, (*arguments, needs))
    torch.library.opcheck(custom.draw_seed_on, (torch.empty(0),), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("base", BASES)
def test_flatten_is_undone(base):
    from fastpeft.ops import custom

    w = weight(base)
    tensors, described = custom.flatten(w)
    again = custom.unflatten(tensors, described)
    assert custom.flatten(again)[1] == described
    assert all(one is other for one, other in zip(tensors, custom.flatten(again)[0], strict=True))


@pytest.mark.parametrize("base", BASES)
def test_compile_has_no_break_and_the_same_values(base):
    torch.compiler.reset()
    w, inputs = weight(base), trained()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y, expected = compiled(inputs, w), call(inputs, w, impl="torch")
    assert_close("y", y, expected, OTHER_ORDER_OF_SUMS)
    for name, got, want in zip(("dx", "da", "db", "dbias"), gradients(y, inputs), gradients(expected, inputs)):
        assert_close(name, got, want, OTHER_ORDER_OF_SUMS)


def test_compile_with_dropout_draws_a_new_mask_per_call_and_the_same_in_backward():
    torch.compiler.reset()
    w, inputs = weight("dense"), trained()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    y = compiled(inputs, w, dropout_p=0.5)
    torch.manual_seed(3)
    assert_bits_equal("same seed", compiled(inputs, w, dropout_p=0.5), y)
    assert not torch.equal(compiled(inputs, w, dropout_p=0.5), y)
    torch.manual_seed(3)
    eager = call(inputs, w, dropout_p=0.5, impl="torch")
    assert_close("eager's mask", y, eager, OTHER_ORDER_OF_SUMS)
    for name, got, want in zip(("dx", "da", "db", "dbias"), gradients(y, inputs), gradients(eager, inputs)):
        assert_close(name, got, want, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_step_is_traced_on_fake_tensors(impl, base):
    """No kernel runs, no value is asked for: also with dropout, and where the kernels could not run at all."""
    with FakeTensorMode():
        w = weight(base) if base == "dense" else _fake_nf4()
        inputs = trained()
        y = call(inputs, w, dropout_p=0.25, impl=impl)
        assert y.shape == (2, M // 2, N)
        assert [g.shape for g in gradients(y, inputs)] == [tensor.shape for tensor in inputs]


def _fake_nf4():
    from fastpeft.ops.nf4 import NF4Weight

    packed, absmax = torch.empty(N * K // 2, dtype=torch.uint8), torch.empty(N * K // 64)
    return NF4Weight.unchecked(packed, absmax, (N, K), 64, "nf4", torch.float32, None)


def test_meta_tensors_give_shapes():
    x, a, b, bias = (tensor.detach().to("meta").requires_grad_() for tensor in trained())
    y = lora_linear(x, torch.empty(N, K, device="meta"), a, b, bias, dropout_p=0.5)
    assert y.is_meta
    assert y.shape == (2, M // 2, N)
    assert all(g.is_meta for g in torch.autograd.grad(y.sum(), (x, a, b, bias)))


@pytest.mark.parametrize("base", BASES)
def test_torch_func_is_not_broken(base):
    w = weight(base)
    x, a, b, bias = (tensor.detach() for tensor in trained())

    def loss(a, b):
        return lora_linear(x, w, a, b, bias, scale=SCALE).square().sum()

    da, db = torch.func.grad(loss, argnums=(0, 1))(a, b)
    eager = [tensor.clone().requires_grad_() for tensor in (a, b)]
    for name, got, want in zip(("da", "db"), (da, db), torch.autograd.grad(loss(*eager), eager)):
        assert_close(name, got, want, OTHER_ORDER_OF_SUMS)
    per_row = torch.func.vmap(lambda row: lora_linear(row, w, a, b, bias, scale=SCALE))(x)
    assert_close("vmap", per_row, lora_linear(x, w, a, b, bias, scale=SCALE), OTHER_ORDER_OF_SUMS)
    _, tangent = torch.func.jvp(lambda a: lora_linear(x, w, a, b, bias, scale=SCALE), (a,), (a,))
    assert torch.isfinite(tangent).all()


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(base, reentrant, monkeypatch):
    from fastpeft.ops import lora

    monkeypatch.setattr(lora, "_is_small", lambda *call: False)
    w, inputs = weight(base), trained()
    torch.manual_seed(5)
    plain = gradients(call(inputs, w, dropout_p=0.5), inputs)
    torch.manual_seed(5)
    recomputed = checkpoint(lambda *t: call(t, w, dropout_p=0.5), *inputs, use_reentrant=reentrant)
    recomputed.square().sum().backward()
    for got, want in zip(inputs, plain):
        assert_bits_equal("gradient", got.grad, want)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.watched
def test_inference_mode_and_no_grad_give_the_same_bits(impl, base, device, monkeypatch):
    from fastpeft.ops import lora

    monkeypatch.setattr(lora, "_is_small", lambda *call: False)
    w, inputs = weight(base, device), trained(device)
    expected = call(inputs, w, impl=impl)
    with torch.inference_mode():
        assert_bits_equal("inference_mode", call(inputs, w, impl=impl), expected.detach())
    with torch.no_grad():
        assert_bits_equal("no_grad", call(inputs, w, impl=impl), expected.detach())


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.watched
def test_a_second_differentiation_is_refused_by_name(impl, device, monkeypatch):
    from fastpeft.ops import lora

    monkeypatch.setattr(lora, "_is_small", lambda *call: False)
    w, inputs = weight("dense", device), trained(device)
    first = torch.autograd.grad(call(inputs, w, impl=impl).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"lora_linear: expected first-order gradients.*impl='reference'"):
        first[1].sum().backward()
    (da,) = torch.autograd.grad(call(inputs, w, impl="reference").square().sum(), inputs[1], create_graph=True)
    da.sum().backward()
    assert inputs[0].grad is not None


def test_the_graph_can_be_kept_for_a_second_backward():
    w, inputs = weight("dense"), trained()
    y = call(inputs, w).sum()
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y, inputs)):
        assert_bits_equal("gradient", one, other)
