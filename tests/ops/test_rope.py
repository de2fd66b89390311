"""The rotary embedding of both implementations against float64: values, gradients, positions, tracing, refusals."""

import pytest
import torch

from fastpeft.ops.rope import apply_rope
from tests.ops.rope_cases import ROWS, SHAPES, draw, in_dtype, table
from tests.tolerance import GRADCHECK, assert_bits_equal, assert_no_worse

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EACH_IMPL = pytest.mark.parametrize("impl", ["torch", "triton"])
EACH_DTYPE = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
NAMES = ("q'", "k'", "dq", "dk")

pytestmark = pytest.mark.watched


def run(impl, q, k, dq, dk, cos, sin, **options):
    outputs = apply_rope(q, k, cos, sin, impl=impl, **options)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, (q, k), (dq, dk))]


def place(kind, shape, device):
    b, s = SHAPES[shape][:2]
    if kind == "table":
        return {}
    if kind == "offset":
        return {"offset": ROWS - s}
    return {"positions": torch.randint(0, ROWS, (b if kind == "positions" else 1, s), device=device)}


@EACH_IMPL
@EACH_DTYPE
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager(shape, interleaved, dtype, impl, device):
    tensors = draw(shape, dtype, device)
    cos, sin = (part.to(device) for part in table(SHAPES[shape][5] // 2))
    got = run(impl, *tensors, cos, sin, interleaved=interleaved)
    exact = in_dtype(torch.float64, *tensors, cos, sin, interleaved=interleaved)
    eager = in_dtype(FP32, *tensors, cos, sin, interleaved=interleaved)
    for name, *values in zip(NAMES, got, exact, eager):
        assert_no_worse(name, values[0], values[1], values[2].to(dtype))


@EACH_IMPL
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "heads-first"])
@pytest.mark.parametrize("kind", ["table", "offset", "positions", "shared-positions"])
@pytest.mark.parametrize("shape", ["odd", "partial"])
def test_positions(shape, kind, transposed, impl, device):
    tensors = draw(shape, FP32, device, transposed=transposed)
    cos, sin = (part.to(device) for part in table(SHAPES[shape][5] // 2))
    where = place(kind, shape, device)
    got = run(impl, *tensors, cos, sin, **where)
    for name, one, other in zip(NAMES, got, in_dtype(torch.float64, *tensors, cos, sin, **where)):
        assert_no_worse(name, one, other, other.float())


@EACH_IMPL
@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_per_token(batch, impl, device):
    """The form in which transformers hands over cos and sin, without their second half."""
    b, s, *_, rotated = SHAPES["odd"]
    tensors = draw("odd", FP32, device)
    cos, sin = (part.view(batch, s, -1).to(device) for part in table(rotated // 2, rows=batch * s))
    assert batch in (1, b)
    got = run(impl, *tensors, cos, sin)
    for name, one, other in zip(NAMES, got, in_dtype(torch.float64, *tensors, cos, sin)):
        assert_no_worse(name, one, other, other.float())


@EACH_IMPL
def test_queries_alone(impl, device):
    q, k, dq, dk = draw("odd", FP32, device)
    cos, sin = (part.to(device) for part in table(5))
    alone, nothing = apply_rope(q, None, cos, sin, impl=impl)
    assert nothing is None
    both = run(impl, q, k, dq, dk, cos, sin)
    assert_bits_equal("q'", alone.detach(), both[0])
    assert_bits_equal("dq", torch.autograd.grad(alone, q, dq)[0], both[2])


@EACH_IMPL
def test_only_what_needs_a_gradient_gets_one(impl, device):
    q, k, _, dk = draw("odd", FP32, device)
    cos, sin = (part.to(device) for part in table(5))
    turned = apply_rope(q.detach(), k, cos, sin, impl=impl)
    assert not apply_rope(q.detach(), k.detach(), cos, sin, impl=impl)[0].requires_grad
    turned[1].backward(dk)
    assert q.grad is None
    assert k.grad is not None


def test_gradients_of_every_order():
    q, k, *_ = draw("odd", torch.float64, "cpu")
    cos, sin = table(5, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, cos, sin, impl="torch"), (q, k), **GRADCHECK)
    assert torch.autograd.gradgradcheck(lambda q, k: apply_rope(q, k, cos, sin, impl="torch"), (q, k), **GRADCHECK)


@EACH_IMPL
def test_inputs_stay_and_two_backwards_agree(impl, device):
    q, k, dq, dk = draw("partial", BF16, device)
    cos, sin = (part.to(device) for part in table(10))
    before = [tensor.detach().clone() for tensor in (q, k, dq, dk, cos, sin)]
    outputs = apply_rope(q, k, cos, sin, impl=impl)
    first = torch.autograd.grad(outputs, (q, k), (dq, dk), retain_graph=True)
    second = torch.autograd.grad(outputs, (q, k), (dq, dk))
    for name, one, other in zip(("dq", "dk"), first, second):
        assert_bits_equal(name, one, other)
    for one, other in zip((q, k, dq, dk, cos, sin), before):
        assert_bits_equal("an input", one.detach(), other)


def test_the_torch_implementation_traces():
    q, k, *_ = draw("odd", FP32, "cpu")
    cos, sin = table(5)

    def call(q, k):
        return apply_rope(q, k, cos, sin, impl="torch")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, got = call(q, k), compiled(q, k)
    for name, one, other in zip(("q'", "k'"), got, expected):
        assert_bits_equal(name, one.detach(), other.detach())
    grads = [torch.autograd.grad(outputs[0].sum() + outputs[1].square().sum(), (q, k)) for outputs in (got, expected)]
    for one, other in zip(*grads):
        assert_bits_equal("gradient", one, other)
    on_meta = apply_rope(q.detach().to("meta"), k.detach().to("meta"), cos.to("meta"), sin.to("meta"))
    assert [tuple(out.shape) for out in on_meta] == [tuple(q.shape), tuple(k.shape)]


def test_an_empty_batch():
    q = torch.zeros(0, 3, 2, 4)
    cos, sin = table(2)
    for impl in ("torch", "triton"):
        assert apply_rope(q, q, cos, sin, impl=impl)[1].shape == q.shape


@EACH_IMPL
def test_a_position_outside_the_table_does_not_pass_silently(impl, device):
    q = torch.ones(1, 2, 1, 4, device=device)
    cos, sin = (part.to(device) for part in table(2))
    positions = torch.tensor([[3, ROWS]], device=device)
    if impl == "torch":
        with pytest.raises(IndexError):
            apply_rope(q, None, cos, sin, positions=positions, impl=impl)
        return
    turned, _ = apply_rope(q, None, cos, sin, positions=positions, impl=impl)
    assert torch.isfinite(turned[0, 0]).all()
    assert turned[0, 1].isnan().all()


def ones(*shape, dtype=FP32):
    return torch.ones(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": ones(2, 3, 8)}, r"floating q \[B, S, H, D\], got \(2, 3, 8\)"),
        ({"k": ones(2, 4, 1, 8)}, r"expected k \[B=2, S=3, H_kv, D=8\].*got \(2, 4, 1, 8\)"),
        ({"k": ones(2, 3, 1, 8, dtype=BF16)}, "bfloat16"),
        ({"cos": ones(9, 3)}, r"cos and sin alike.*\(9, 3\).*\(9, 4\)"),
        ({"cos": ones(9, 8), "sin": ones(9, 8)}, "0 < R <= D = 8, got 8"),
        ({"cos": ones(2, 4, 4), "sin": ones(2, 4, 4)}, r"expected cos \[B=2 or 1, S=3, R/2\], got \(2, 4, 4\)"),
        ({"offset": 7}, "rows 7 to 9 in a table of P = 9 rows"),
        ({"offset": -1}, "rows -1 to 1"),
        ({"positions": ones(2, 3)}, "integer positions.*float32"),
        ({"positions": torch.zeros(2, 4, dtype=torch.int64)}, r"got \(2, 4\)"),
        ({"positions": torch.zeros(2, 3, dtype=torch.int64), "offset": 1}, "got both"),
        ({"cos": ones(9, 4).requires_grad_()}, "without a gradient"),
    ],
)
def test_bad_input(change, message):
    arguments = {"q": ones(2, 3, 2, 8), "k": ones(2, 3, 1, 8), "cos": ones(9, 4), "sin": ones(9, 4)} | change
    with pytest.raises(ValueError, match=message) as caught:
        apply_rope(**arguments)
    assert "\n" not in str(caught.value)
