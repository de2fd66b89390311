"""swiglu and geglu of every implementation against float64: values, gradients, one packed tensor, what is kept, tracing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastpeft.ops.glu import ACTIVATIONS, geglu, glu, swiglu
from tests.ops.glu_cases import EAGER, SHAPES, draw, in_dtype
from tests.saved_bytes import SavedBytes
from tests.tolerance import GRADCHECK, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, assert_no_worse

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EACH_IMPL = pytest.mark.parametrize("impl", ["torch", "triton"])
EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
EACH_DTYPE = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
NAMES = ("h", "dgate", "dup")

pytestmark = pytest.mark.watched


def run(impl, gate, up, dh, activation):
    h = glu(gate, up, activation, impl=impl)
    return [h.detach(), *torch.autograd.grad(h, (gate, up), dh)]


def check(impl, gate, up, dh, activation):
    exact, eager = (in_dtype(dtype, gate, up, dh, activation) for dtype in (FP64, gate.dtype))
    for name, got, want, plain in zip(NAMES, run(impl, gate, up, dh, activation), exact, eager):
        assert_no_worse(name, got, want, plain)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@EACH_DTYPE
@EACH_ACTIVATION
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager(shape, activation, dtype, impl, device):
    check(impl, *draw(shape, dtype, device), activation)


@EACH_IMPL
@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_any_strides(layout, impl, device):
    check(impl, *draw("odd", BF16, device, layout), "silu")
    check(impl, *draw("odd", FP32, device, layout), "gelu_tanh")


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@EACH_ACTIVATION
@pytest.mark.parametrize("shape", ["odd", "3d"])
def test_one_packed_tensor_is_read_where_it_lies(shape, activation, impl, device):
    gate, up, dh = draw(shape, BF16, device)
    packed = torch.cat([gate.detach(), up.detach()], -1).requires_grad_()
    own = [packed]
    with SavedBytes(own) as saved:
        h = glu(packed, activation=activation, impl=impl)
    if impl != "reference":
        assert saved.total() == 0, saved.storages()
    (d,) = torch.autograd.grad(h, packed, dh)
    assert h.is_contiguous()
    exact, eager = (in_dtype(dtype, gate, up, dh, activation) for dtype in (FP64, BF16))
    for name, got, want, plain in zip(NAMES, (h.detach(), *d.chunk(2, -1)), exact, eager):
        assert_no_worse(name, got, want, plain)


@EACH_ACTIVATION
def test_torch_has_the_bits_of_the_eager_code(activation):
    tensors = draw("3d", BF16, "cpu")
    for name, got, want in zip(NAMES, run("torch", *tensors, activation), in_dtype(BF16, *tensors, activation)):
        assert_bits_equal(name, got, want)


@EACH_IMPL
def test_erf_and_tanh_are_apart(impl, device):
    """A library that takes one of them for both is off by 5e-4: wrong for Gemma."""
    gate, up, _ = draw("odd", FP32, device)
    exact = {a: in_dtype(FP64, gate, up, torch.ones_like(up), a)[0] for a in ("gelu", "gelu_tanh")}
    for approximate, activation in (("none", "gelu"), ("tanh", "gelu_tanh")):
        h = geglu(gate, up, approximate=approximate, impl=impl).detach()
        assert_close(approximate, h, exact[activation], OTHER_ORDER_OF_SUMS)
    distance = (exact["gelu"] - exact["gelu_tanh"]).abs().max()
    assert distance > 10 * OTHER_ORDER_OF_SUMS * exact["gelu"].abs().max()
    assert_bits_equal("swiglu", swiglu(gate, up, impl=impl), glu(gate, up, "silu", impl=impl))


@EACH_IMPL
@EACH_ACTIVATION
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=["fp16", "fp32"])
def test_large_values_saturate(dtype, activation, impl, device):
    values = torch.tensor([[-6e4, -100.0, -20.0, 0.0, 20.0, 100.0, 6e4]], device=device, dtype=dtype)
    check(impl, values.requires_grad_(), torch.ones_like(values).requires_grad_(), torch.ones_like(values), activation)


@EACH_IMPL
def test_keeps_gate_and_up_only(impl, device):
    gate, up, dh = draw("odd", BF16, device)
    with SavedBytes([gate, up]) as saved:
        h = swiglu(gate, up, impl=impl)
    assert saved.total() == 0, saved.storages()
    h.backward(dh)
    assert gate.grad is not None


@EACH_IMPL
@pytest.mark.parametrize("frozen", ["gate", "up"])
def test_only_what_is_needed_is_kept_and_computed(frozen, impl, device):
    gate, up, dh = draw("odd", FP32, device)
    want = dict(zip(NAMES, run(impl, gate, up, dh, "gelu")))
    named = {"gate": gate, "up": up}
    named[frozen].requires_grad_(False)
    with SavedBytes() as saved:
        h = glu(gate, up, "gelu", impl=impl)
    assert saved.total() == (2 if frozen == "up" else 1) * gate.numel() * 4
    h.backward(dh)
    for name, tensor in named.items():
        assert (tensor.grad is None) == (name == frozen)
        if name != frozen:
            assert_bits_equal(name, tensor.grad, want[f"d{name}"])


@EACH_IMPL
@EACH_ACTIVATION
def test_inputs_stay_and_two_backwards_agree(activation, impl, device):
    gate, up, dh = draw("odd", BF16, device)
    before = [tensor.detach().clone() for tensor in (gate, up, dh)]
    h = glu(gate, up, activation, impl=impl)
    first = torch.autograd.grad(h, (gate, up), dh, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(h, (gate, up), dh)):
        assert_bits_equal("second backward", other, one)
    for one, other in zip((gate, up, dh), before):
        assert_bits_equal("an input", one.detach(), other)


@EACH_ACTIVATION
def test_gradcheck(activation):
    gate, up, _ = draw((3, 5), FP64, "cpu")
    assert torch.autograd.gradcheck(lambda g, u: glu(g, u, activation, impl="torch"), (gate, up), **GRADCHECK)
    packed = torch.randn(3, 10, dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: glu(p, None, activation, impl="torch"), (packed,), **GRADCHECK)


@EACH_IMPL
def test_a_second_differentiation_is_refused_by_name(impl, device):
    gate, up, _ = draw("odd", FP32, device)
    (d,) = torch.autograd.grad(swiglu(gate, up, impl=impl).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="glu: expected first-order gradients"):
        d.sum().backward()


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
def test_tracers_see_an_operator(packed):
    gate, up, dh = draw("3d", FP32, "cpu")
    inputs = (torch.cat([gate, up], -1).detach().requires_grad_(),) if packed else (gate, up)

    def call(*inputs):
        return glu(*inputs, activation="gelu_tanh", impl="torch")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, got = call(*inputs), compiled(*inputs)
    assert_bits_equal("h", got.detach(), expected.detach())
    for one, other in zip(torch.autograd.grad(got, inputs, dh), torch.autograd.grad(expected, inputs, dh)):
        assert_bits_equal("gradient", one, other)
    on_meta = [tensor.detach().to("meta").requires_grad_() for tensor in inputs]
    h = glu(*on_meta, activation="silu")
    assert h.shape == dh.shape
    assert [g.shape for g in torch.autograd.grad(h.sum(), on_meta)] == [t.shape for t in inputs]
    with FakeTensorMode():
        fake = [torch.empty(tensor.shape, requires_grad=True) for tensor in inputs]
        h = glu(*fake, impl="triton")
        assert [g.shape for g in torch.autograd.grad(h.sum(), fake)] == [t.shape for t in inputs]


def test_opcheck():
    from fastpeft.ops import glu_custom

    gate, up, _ = draw("odd", FP32, "cpu")
    for arguments in ((gate, up, "silu", "torch"), (gate[:, :96].detach().requires_grad_(), None, "gelu", "torch")):
        torch.library.opcheck(glu_custom.glu, arguments)


@EACH_ACTIVATION
def test_torch_func_is_not_broken(activation):
    gate, up, _ = (tensor.detach() for tensor in draw("odd", FP32, "cpu"))
    d = torch.func.grad(lambda g: glu(g, up, activation).sum())(gate)
    want = torch.func.grad(lambda g: (EAGER[activation](g) * up).sum())(gate)
    assert_close("dgate", d, want, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    gate, up, dh = draw("odd", BF16, "cpu")
    want = run("torch", gate, up, dh, "silu")
    checkpoint(lambda *t: swiglu(*t, impl="torch"), gate, up, use_reentrant=reentrant).backward(dh)
    for name, one, other in zip(NAMES[1:], (gate.grad, up.grad), want[1:]):
        assert_bits_equal(name, one, other)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_an_empty_batch_and_inference(impl, device):
    empty = torch.zeros(0, 6, device=device)
    assert swiglu(empty, empty, impl=impl).shape == (0, 6)
    assert swiglu(empty, impl=impl).shape == (0, 3)
    gate, up, _ = draw("odd", BF16, device)
    with torch.inference_mode():
        assert_bits_equal("h", swiglu(gate, up, impl=impl), swiglu(gate.detach(), up.detach(), impl=impl))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: glu(torch.ones(2, 3), torch.ones(2, 4)), r"gate and up alike, got \(2, 3\).*\(2, 4\)"),
        (lambda: glu(torch.ones(2), torch.ones(2, dtype=BF16)), "bfloat16"),
        (lambda: glu(torch.ones(2), torch.ones(2, device="meta")), "meta"),
        (lambda: glu(torch.ones(2, 3)), r"\[..., 2N\], got \(2, 3\)"),
        (lambda: glu(torch.ones(2, dtype=torch.int64)), "floating gate.*int64"),
        (lambda: glu(torch.ones(())), r"floating gate \[..., N\], got \(\)"),
        (lambda: glu(torch.ones(2), torch.ones(2), "relu"), "('silu', 'gelu', 'gelu_tanh'), got 'relu'"),
        (lambda: geglu(torch.ones(2), approximate="erf"), "'none' or 'tanh', got 'erf'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message.replace("('", r"\('").replace("')", r"'\)")) as caught:
        call()
    assert "\n" not in str(caught.value)
