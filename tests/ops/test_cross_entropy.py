"""linear_cross_entropy of both implementations against float64: loss and every gradient, chunks, tracing, memory, refusals."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastpeft.ops import cross_entropy_torch, cross_entropy_triton
from fastpeft.ops.cross_entropy import linear_cross_entropy
from fastpeft.ops.nf4 import quantize_4bit
from fastpeft.reference.cross_entropy import linear_cross_entropy as formula
from tests.ops.cross_entropy_cases import NAMES, SHAPES, TERMS, as_transformers, draw, in_dtype
from tests.ops.test_no_sync import CountReads
from tests.saved_bytes import SavedBytes
from tests.tolerance import GRADCHECK, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, assert_no_worse

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EACH_IMPL = pytest.mark.parametrize("impl", ["torch", "triton"])
EACH_DTYPE = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])

pytestmark = pytest.mark.watched


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks and several blocks of rows in each, for a few rows."""
    for passes in (cross_entropy_torch, cross_entropy_triton):
        monkeypatch.setattr(passes, "ROWS", 7)
    monkeypatch.setattr(cross_entropy_torch, "SCRATCH_BYTES", 3 * 97 * 4)


def run(impl, x, w, bias, labels, dy, **options):
    loss = linear_cross_entropy(x, w, labels, bias=bias, impl=impl, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, w, bias), dy)]


def dy_of(labels, reduction, dtype=FP32):
    return torch.randn(labels.shape if reduction == "none" else (), dtype=dtype).to(labels.device)


def check(impl, inputs, dy, **options):
    before = [tensor.detach().clone() for tensor in inputs]
    got = run(impl, *inputs, dy, **options)
    exact = in_dtype(FP64, *inputs, dy, **options)
    eager = as_transformers(*inputs, dy, **options)
    if options.get("reduction") != "none":  # one number's error is luck: compare that of every row
        each = options | {"reduction": "none"}
        dys = dy_of(inputs[3], "none")
        with torch.no_grad():
            x, w, bias, labels = inputs
            got.append(linear_cross_entropy(x, w, labels, bias=bias, impl=impl, **each))
        kept = (labels != -100).sum().clamp(min=1) if options.get("reduction", "mean") == "mean" else 1
        assert_close("the reduced loss", got[0], got[-1].sum() / kept, OTHER_ORDER_OF_SUMS)
        exact.append(in_dtype(FP64, *inputs, dys, **each)[0])
        eager.append(as_transformers(*inputs, dys, **each)[0])
        got[0], exact[0], eager[0] = got.pop(), exact.pop(), eager.pop()
    for name, *values in zip(NAMES, got, exact, eager):
        assert_no_worse(f"{name} of {impl}", *values)
    for tensor, was in zip(inputs, before):
        assert_bits_equal("an input", tensor.detach(), was)


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize("terms", TERMS)
def test_no_worse_than_transformers(terms, dtype, impl, device, small_chunks):
    inputs = draw("odd", dtype, device)
    check(impl, inputs, dy_of(inputs[3], "mean"), **TERMS[terms])


@EACH_IMPL
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, impl, device):
    inputs = draw(shape, FP32, device, ignored=0.3)
    check(impl, inputs, dy_of(inputs[3], "mean"), **TERMS["plain" if shape == "one-column" else "all"])


@EACH_IMPL
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_every_reduction(reduction, dtype, impl, device, small_chunks):
    inputs = draw("odd", dtype, device)
    check(impl, inputs, dy_of(inputs[3], reduction), reduction=reduction, **TERMS["all"])


def test_float64_passes_gradcheck(small_chunks):
    *leaves, labels = draw("small", FP64)

    def loss(x, w, bias):
        return linear_cross_entropy(x, w, labels, bias=bias, **TERMS["all"])

    assert torch.autograd.gradcheck(loss, leaves, **GRADCHECK)


def test_the_reference_is_differentiable_twice():
    x, w, bias, labels = draw("one-row", FP64, ignored=0)
    assert torch.autograd.gradgradcheck(lambda x: formula(x, w, labels, bias, **TERMS["all"]), x, **GRADCHECK)
    by_name = linear_cross_entropy(x, w, labels, bias=bias, impl="reference")
    assert_no_worse("loss", by_name.detach(), F.cross_entropy(F.linear(x, w, bias), labels).detach(), by_name.detach())


@EACH_IMPL
@pytest.mark.parametrize("count", [13, torch.tensor(13), torch.tensor([13.0])], ids=["int", "tensor", "one-element"])
def test_num_items_divides_the_sum(count, impl, device):
    x, w, bias, labels = draw("small", FP32, device)
    got = run(impl, x, w, bias, labels, torch.ones((), device=device), num_items=count)
    one = torch.ones((), device=device)
    exact, eager = (
        [value / 13 for value in in_dtype(dtype, x, w, bias, labels, one, reduction="sum")] for dtype in (FP64, FP32)
    )
    for name, *values in zip(NAMES, got, exact, eager):
        assert_no_worse(name, *values)


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize(
    "options", [{}, {"num_items": 0}, {"num_items": 5}, {"reduction": "sum"}, {"reduction": "none"}]
)
def test_all_labels_ignored_is_zero(options, dtype, impl, device):
    """F.cross_entropy gives NaN for the mean, and a step with NaN gradients ends a training."""
    x, w, bias, labels = draw("small", dtype, device, ignored=1)
    with torch.no_grad():
        x[0] = float("nan")  # the hidden state of a padded row may be anything
    for value in run(impl, x, w, bias, labels, dy_of(labels, options.get("reduction")), **options)[:1]:
        assert not value.any()
    x, w, bias, labels = draw("small", dtype, device, ignored=1)
    for name, value in zip(NAMES, run(impl, x, w, bias, labels, dy_of(labels, options.get("reduction")), **options)):
        assert not value.any(), name


@EACH_IMPL
@pytest.mark.parametrize("wanted", ["x", "w", "bias"])
def test_only_what_needs_a_gradient_gets_one(wanted, impl, device):
    x, w, bias, labels = draw("small", FP32, device)
    everything = run(impl, x, w, bias, labels, torch.ones((), device=device))
    leaves = {n: t.detach().requires_grad_(n == wanted) for n, t in {"x": x, "w": w, "bias": bias}.items()}
    with SavedBytes() as saved:
        loss = linear_cross_entropy(leaves["x"], leaves["w"], labels, bias=leaves["bias"], impl=impl)
    assert saved.total() == leaves[wanted].numel() * 4 + 4
    loss.backward()
    for (name, leaf), grad in zip(leaves.items(), everything[1:]):
        assert (leaf.grad is None) == (name != wanted)
        if name == wanted:
            assert_bits_equal(name, leaf.grad, grad)


@EACH_IMPL
def test_without_gradients_nothing_is_kept_and_the_loss_is_the_same(impl, device):
    x, w, bias, labels = draw("small", BF16, device)
    expected = linear_cross_entropy(x, w, labels, bias=bias, impl=impl)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), SavedBytes() as saved:
            loss = linear_cross_entropy(x, w, labels, bias=bias, impl=impl)
        assert not loss.requires_grad
        assert saved.total() == 0
        assert_bits_equal("loss", loss.clone(), expected.detach())


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backwards_agree(reduction, dtype, impl, device):
    """Liger multiplies the saved gradient in place: its second backward is the square of the first."""
    x, w, bias, labels = draw("small", dtype, device)
    loss = linear_cross_entropy(x, w, labels, bias=bias, impl=impl, reduction=reduction)
    dy = 3 * torch.ones_like(loss)
    first = torch.autograd.grad(loss, (x, w, bias), dy, retain_graph=True)
    second = torch.autograd.grad(loss, (x, w, bias), dy)
    for name, one, other in zip(NAMES[1:], first, second):
        assert_bits_equal(name, one, other)


@EACH_IMPL
def test_logits_far_from_zero_lose_nothing(impl, device):
    """log-sum-exp is not formed where its parts cancel: three equal logits of -3e4 have the loss log 3."""
    x = torch.full((1, 1), -3e4, device=device, requires_grad=True)
    loss = linear_cross_entropy(
        x, torch.ones(3, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device), impl=impl
    )
    exact = torch.log(torch.tensor(3.0, dtype=FP64))
    assert_no_worse("loss", loss.detach(), exact, exact.float())


def test_checkpointing_of_both_kinds_is_bit_equal():
    x, w, bias, labels = draw("odd", FP32)
    expected = run("torch", x, w, bias, labels, torch.ones(()))

    def call(x, w, bias):
        return linear_cross_entropy(x, w, labels, bias=bias)

    for reentrant in (False, True):
        loss = checkpoint(call, x, w, bias, use_reentrant=reentrant)
        loss.backward()
        for name, leaf, grad in zip(NAMES[1:], (x, w, bias), expected[1:]):
            assert_bits_equal(name, leaf.grad, grad)
            leaf.grad = None


def test_strided_inputs_leading_axes_and_int32_labels():
    x, w, bias, labels = draw("odd", FP32)
    expected = run("torch", x, w, bias, labels, torch.ones(()))
    apart = x.detach().t().contiguous().t().requires_grad_()
    transposed = w.detach().t().contiguous().t().requires_grad_()
    got = run("torch", apart, transposed, bias, labels.repeat_interleave(2)[::2].int(), torch.ones(()))
    for name, one, other in zip(NAMES, got, expected):
        assert_no_worse(name, one, other.double(), other)
    per_token = linear_cross_entropy(x.view(3, 11, -1), w, labels.view(3, 11), bias=bias, reduction="none")
    assert per_token.shape == (3, 11)
    assert per_token[labels.view(3, 11) == -100].eq(0).all()


@EACH_IMPL
def test_no_rows(impl, device):
    x = torch.zeros(2, 0, 4, device=device, requires_grad=True)
    w = torch.zeros(5, 4, device=device, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.zeros(2, 0, dtype=torch.int64, device=device), impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == x.shape
    assert not w.grad.any()


def test_autocast_takes_the_products_that_linear_takes():
    x, w, bias, labels = draw("odd", FP32)
    with torch.autocast("cpu", dtype=BF16):
        loss = linear_cross_entropy(x, w, labels, bias=bias)
        expected = F.cross_entropy(F.linear(x, w, bias).float(), labels)
    assert loss.dtype == FP32
    for leaves in ((x, w, bias),):
        exact = in_dtype(FP64, *(leaf.bfloat16() for leaf in leaves), labels, torch.ones(()))
        assert_no_worse("loss", loss.detach(), exact[0], expected.detach())
        for name, one, other, eager in zip(
            NAMES[1:], torch.autograd.grad(loss, leaves), exact[1:], torch.autograd.grad(expected, leaves)
        ):
            assert_no_worse(name, one, other, eager)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_compiled_equals_eager_with_half_the_labels_ignored(trained, reduction):
    """Liger #1338: under torch.compile its loss was silently wrong where labels were ignored."""
    torch._dynamo.reset()
    x, w, bias, labels = draw("small", FP32)
    w = w.detach().requires_grad_(trained)
    leaves = (x, w) if trained else (x,)

    def call(x, w, labels):
        return linear_cross_entropy(x, w, labels, bias=bias.detach(), reduction=reduction, **TERMS["all"])

    expected = call(x, w, labels)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x, w, labels)
    assert_bits_equal("loss", got.detach(), expected.detach())
    dy = torch.randn(expected.shape)
    for one, other in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        assert_bits_equal("gradient", one, other)


class Largest(TorchDispatchMode):
    """The most elements of a new tensor."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        mine = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t.numel() for t in mine if t.untyped_storage()._cdata not in given]  # no views
        self.elements = max([self.elements, *new])
        return out


@EACH_IMPL
def test_the_logits_of_all_rows_are_never_held(impl, device, small_chunks):
    x, w, _, labels = draw("odd", BF16, device, ignored=0)
    m, _, v = SHAPES["odd"]
    frozen = w.detach()
    with Largest() as largest:
        linear_cross_entropy(x, frozen, labels, impl=impl).backward()
    assert largest.elements < m * v / 2
    with Largest() as largest:
        F.cross_entropy(F.linear(x, frozen).float(), labels).backward()
    assert largest.elements >= m * v


def test_fake_tensors_make_what_a_real_run_makes(small_chunks):
    """A planner counts the chunk's buffer: plain calls on fake tensors, not one opaque operator."""

    def step():
        x, w = torch.ones(33, 8, dtype=BF16, requires_grad=True), torch.ones(97, 8, dtype=BF16)
        with Largest() as largest:
            loss = linear_cross_entropy(x, w, torch.zeros(33, dtype=torch.int64))
            loss.backward()
        return largest.elements, loss.shape, x.grad.shape

    real = step()
    with FakeTensorMode():
        assert step() == real
    assert real[0] >= 7 * 97
    on_meta = linear_cross_entropy(
        torch.ones(4, 8, device="meta"),
        torch.ones(5, 8, device="meta"),
        torch.zeros(4, dtype=torch.int64, device="meta"),
    )
    assert on_meta.shape == ()


def test_kernels_read_no_value(device):
    """What runs on a GPU: no look at the labels, which would wait for the device."""
    x, w, bias, labels = draw("small", FP32, device)
    with CountReads() as counted:
        run("triton", x, w, bias, labels, torch.ones((), device=device), num_items=torch.tensor(9.0, device=device))
    assert not counted.reads


def test_rows_that_are_ignored_are_not_computed():
    x, w, _, labels = draw("odd", FP32, ignored=0.5)
    kept = int((labels != -100).sum())
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.__name__.startswith("mm"):
                products.append(args[0].shape[0])
            return function(*args, **(kwargs or {}))

    with Products():
        linear_cross_entropy(x, w.detach(), labels)
    assert products == [kept, kept]


def test_second_derivatives_are_refused():
    x, w, _, labels = draw("odd", FP32)
    loss = linear_cross_entropy(x, w, labels)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: expected first-order gradients"):
        dx.sum().backward()


def test_a_transform_takes_plain_calls():
    x, w, bias, labels = draw("odd", FP32)
    gradient = torch.func.grad(lambda x: linear_cross_entropy(x, w.detach(), labels, bias=bias.detach()))(x.detach())
    exact, eager = (in_dtype(dtype, x, w, bias, labels, torch.ones(()))[1] for dtype in (FP64, FP32))
    assert_no_worse("dx", gradient, exact, eager)


@pytest.mark.parametrize(("label", "message"), [(5, "got 5 at position 2 of 4"), (-1, "got -1 at position 2 of 4")])
def test_a_label_out_of_range_does_not_pass_silently(label, message, device):
    x, w = torch.ones(4, 3, device=device), torch.ones(5, 3, device=device)
    labels = torch.tensor([0, -100, label, 1], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(x, w, labels, impl="torch")
    losses = linear_cross_entropy(x, w, labels, impl="triton", reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]


def ones(*shape, dtype=FP32):
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": ones(4, 2)}, ValueError, r"x \[\.\.\., K\] and w \[V, K\], got \(4, 2\) and \(5, 3\)"),
        ({"labels": ones(4)}, ValueError, r"integer labels \(4,\).*float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"integer labels \(4,\).*got \(3,\)"),
        ({"bias": ones(4)}, ValueError, r"bias \[V=5\], got \(4,\)"),
        ({"w": ones(5, 3, dtype=BF16)}, ValueError, "w in x's floating dtype torch.float32, got torch.bfloat16"),
        ({"reduction": "average"}, ValueError, "got 'average'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items with reduction='mean'"),
        ({"num_items": ones(2)}, ValueError, r"one number, got a tensor \(2,\)"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing in \[0, 1\), got 1.0"),
        ({"softcap": 0.0}, ValueError, "softcap more than 0 or None, got 0.0"),
        ({"w": quantize_4bit(torch.ones(64, 64))}, NotImplementedError, "dense w.*NF4Weight"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": ones(4, 3), "w": ones(5, 3), "labels": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message) as caught:
        linear_cross_entropy(**arguments)
    assert "\n" not in str(caught.value)


def test_what_is_kept_dies_with_backward():
    x, w, bias, labels = draw("odd", FP32)
    with SavedBytes() as saved:
        loss = linear_cross_entropy(x, w.detach(), labels, bias=bias.detach())
    assert saved.total() == x.numel() * 4 + 4
    loss.backward()
    gc.collect()
    assert saved.total() == 0
