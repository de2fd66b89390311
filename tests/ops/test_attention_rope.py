"""attention(..., rope=): q and k rotated before they meet, by every implementation, beforehand or when tiles are loaded."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft.ops.attention import attention
from fastpeft.reference.attention import attention as formula
from fastpeft.reference.rope import apply_rope
from tests.saved_bytes import SavedBytes
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, assert_no_worse

B, S, H, HKV, D = 2, 37, 4, 2, 16
BF16, FP32 = torch.bfloat16, torch.float32


def draw(dtype=FP32, device="cpu", rows=B, columns=D // 2):
    """q, k, v with gradients, do, (cos, sin) of other angles for every token of every batch."""
    tensors = [torch.randn(B, S, heads, D).to(device, dtype).requires_grad_() for heads in (H, HKV, HKV)]
    angles = torch.rand(rows, S, columns).to(device) * 6
    return tensors, torch.randn(B, S, H, D).to(device, dtype), (angles.cos(), angles.sin())


def exactly(tensors, do, rope, dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors)
    turned = (apply_rope(x, *(table.to(dtype) for table in rope)) for x in (q, k))
    o = formula(*turned, v, causal=True)
    return (o, *torch.autograd.grad(o, (q, k, v), do.to(dtype)))


WAYS = {"reference": {"impl": "reference"}, "torch": {"impl": "torch"}, "before": {"impl": "triton"}}
WAYS["on load"] = {"impl": "triton", "rope_on_load": True}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.watched
def test_forward_and_gradients(way, dtype, device):
    tensors, do, rope = draw(dtype, device)
    o = attention(*tensors, causal=True, rope=rope, **WAYS[way])
    got = (o, *torch.autograd.grad(o, tensors, do))
    exact, eager = (exactly(tensors, do, rope, of) for of in (torch.float64, dtype))
    for name, one, other, worse in zip(("o", "dq", "dk", "dv"), got, exact, eager, strict=True):
        assert_no_worse(name, one, other, worse)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.watched
def test_tables_are_given_in_any_of_their_forms(way, device):
    """A row for all batches or one each, half the columns or all of them with alike halves."""
    tensors, _, (cos, sin) = draw(device=device, rows=1)
    expected = attention(*tensors, rope=(cos, sin), **WAYS[way])
    double = tuple(torch.cat([table, table], -1) for table in (cos, sin))
    for other in (double, (cos[0], sin[0]), (double[0][0], double[1][0]), tuple(t.expand(B, -1, -1) for t in double)):
        assert_bits_equal("o", attention(*tensors, rope=other, **WAYS[way]), expected)


@pytest.mark.parametrize("way", ["torch", "on load"])
@pytest.mark.watched
def test_q_and_k_are_kept_once(way, device):
    """Beforehand: rotated copies, and no others. On load: no copy at all."""
    tensors, _, rope = draw(device=device)
    with SavedBytes([*tensors, *rope]) as watch:
        o = attention(*tensors, causal=True, rope=rope, **WAYS[way])
        kept = watch.total()
    copies = sum(x.numel() * 4 for x in tensors[:2]) if way == "torch" else 0
    rows = S if way == "torch" else -(-S // 32) * 32
    assert kept == copies + o.numel() * 4 + B * H * rows * 4  # and lse


def test_part_of_the_columns_is_rotated_beforehand_only(device):
    tensors, do, rope = draw(device=device, columns=D // 4)
    o = attention(*tensors, causal=True, rope=rope, impl="torch")
    got = (o, *torch.autograd.grad(o, tensors, do))
    exact, eager = (exactly(tensors, do, rope, of) for of in (torch.float64, FP32))
    for name, one, other, worse in zip(("o", "dq", "dk", "dv"), got, exact, eager, strict=True):
        assert_no_worse(name, one, other, worse)
    with pytest.raises(NotImplementedError, match=r"power of two.*got D=16 and R=8; leave rope_on_load=False"):
        attention(*tensors, rope=rope, rope_on_load=True, impl="triton")


@pytest.mark.parametrize("way", ["torch", "on load"])
@pytest.mark.watched
def test_compiled_is_eager(way, device):
    torch.compiler.reset()
    tensors, do, rope = draw(device=device)

    def call(q, k, v, cos, sin):
        return attention(q, k, v, causal=True, softcap=3.0, rope=(cos, sin), **WAYS[way])

    o, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors, *rope), call(*tensors, *rope)
    assert_close("o", o, expected, OTHER_ORDER_OF_SUMS)
    for name, got, want in zip("qkv", *(torch.autograd.grad(x, tensors, do) for x in (o, expected)), strict=True):
        assert_close(f"d{name}", got, want, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("way", WAYS)
def test_fake_tensors_give_shapes(way):
    with FakeTensorMode():
        tensors, do, rope = draw()
        o = attention(*tensors, rope=rope, **WAYS[way])
        assert [x.shape for x in torch.autograd.grad(o, tensors, do)] == [x.shape for x in tensors]
