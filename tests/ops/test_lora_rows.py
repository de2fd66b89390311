"""lora_linear_rows: a batch whose items use different adapters, against the sum over items in float64."""

import re
from dataclasses import dataclass

import pytest
import torch

from fastpeft.ops.lora_rows import RowAdapter, lora_linear_rows
from fastpeft.ops.nf4 import quantize_4bit
from fastpeft.reference.lora_rows import lora_linear_rows as reference
from tests.saved_bytes import SavedBytes
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, assert_no_worse

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
N, K = 65, 64


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    ranks: tuple[int, ...] = (5, 16, 1)
    items: tuple[int, ...] = (7,)  # the axes of x between batch and K
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype | None = None
    base: str = "dense"


CASES = {
    "mixed": Case((0, 2, -1, 0, 1)),
    "one_adapter": Case((0, 0), (3,)),
    "only_the_base": Case((-1, -1), (3,)),
    "an_adapter_without_items": Case((2, 2, 0)),
    "two_axes": Case((1, -1, 0), items=(3, 5)),
    "no_axis": Case((1, 0, 2, -1, 0), items=()),
    "bfloat16": Case((0, 2, -1, 0, 1), dtype=BF16),
    "float16": Case((0, 2, -1), dtype=F16),
    "bf16_fp32_adapters": Case((0, 1, 0), dtype=BF16, adapter_dtype=F32),
    "nf4": Case((0, 2, -1, 0, 1), base="nf4"),
}
IMPLS = ["torch", "triton", "reference"]


def draw(case, device):
    x = torch.randn(len(case.rows), *case.items, K).to(device, case.dtype)
    w = torch.randn(N, K).to(device, case.dtype)
    adapter_dtype = case.adapter_dtype or case.dtype
    pairs = [(torch.randn(r, K) * K**-0.5, torch.randn(N, r)) for r in case.ranks]
    pairs = [tuple(t.to(device, adapter_dtype) for t in pair) for pair in pairs]
    dy = torch.randn(*x.shape[:-1], N).to(device, case.dtype)
    return x, quantize_4bit(w) if case.base == "nf4" else w, pairs, torch.randn(N).to(device, case.dtype), dy


def results(function, x, pairs, bias, dy, dtype=None):
    def convert(tensor):
        return (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_()

    leaves = [convert(tensor) for tensor in (x, bias, *(t for pair in pairs for t in pair))]
    x, bias, *flat = leaves
    adapters = [RowAdapter(a, b, 0.5 + i) for i, (a, b) in enumerate(zip(flat[::2], flat[1::2], strict=True))]
    y = function(x, adapters, bias)
    grads = torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]
    names = ["dx", "dbias", *(f"d{side}{i}" for i in range(len(pairs)) for side in "ab")]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.watched
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_worse_than_eager(impl, case, device):
    x, w, pairs, bias, dy = draw(case, device)
    exact_w = w if isinstance(w, torch.Tensor) else w.dequantize(torch.float64)
    got = results(
        lambda x, adapters, bias: lora_linear_rows(x, w, adapters, case.rows, bias, impl=impl), x, pairs, bias, dy
    )
    exact = results(
        lambda x, ad, bias: reference(x, exact_w.double(), ad, case.rows, bias), x, pairs, bias, dy, torch.float64
    )

    def eager(x, adapters, bias):
        cast = [(a.to(x.dtype), b.to(x.dtype), scale) for a, b, scale in adapters]
        return reference(x, exact_w.to(x.dtype), cast, case.rows, bias)

    compared = results(eager, x, pairs, bias, dy)
    for name in exact:
        assert_no_worse(name, got[name], exact[name], compared[name])


@pytest.mark.watched
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_two_runs_give_the_same_bits(impl, device):
    x, w, pairs, bias, dy = draw(CASES["mixed"], device)

    def run():
        rows = CASES["mixed"].rows
        return results(lambda x, ad, bias: lora_linear_rows(x, w, ad, rows, bias, impl=impl), x, pairs, bias, dy)

    first, second = run(), run()
    for name in first:
        assert_bits_equal(name, first[name], second[name])


def test_keeps_s_alone_beside_x():
    x, w, pairs, _, _ = draw(CASES["nf4"], "cpu")
    leaves = [t.requires_grad_() for pair in pairs for t in pair]
    adapters = [RowAdapter(a, b, 1.0) for a, b in pairs]
    with SavedBytes([x, *leaves, *w.tensors().values()]) as saved:
        y = lora_linear_rows(x.requires_grad_(), w, adapters, CASES["nf4"].rows)
    assert saved.total() == x.shape[0] * 7 * 16 * 4  # the widest rank
    y.sum().backward()


def test_torch_func_and_fake_tensors_take_plain_calls():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w, pairs, bias, _ = draw(CASES["mixed"], "cpu")
    adapters = [RowAdapter(a, b, 2.0) for a, b in pairs]
    rows = CASES["mixed"].rows
    dx = torch.func.grad(lambda x: lora_linear_rows(x, w, adapters, rows, bias).sum())(x)
    x.requires_grad_()
    (want,) = torch.autograd.grad(lora_linear_rows(x, w, adapters, rows, bias).sum(), x)
    assert_close("dx", dx, want, OTHER_ORDER_OF_SUMS)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert lora_linear_rows(mode.from_tensor(x), w, adapters, rows, bias).shape == (5, 7, N)


BAD = {
    "too_few_rows": ({"row_adapters": [0]}, "each of 2 items"),
    "unknown_adapter": ({"row_adapters": [0, 1]}, "-1 to 0"),
    "no_adapters": ({"adapters": []}, "at least one adapter"),
    "b_transposed": ({"adapters": [RowAdapter(torch.zeros(2, 4), torch.zeros(2, 3), 1.0)]}, "adapter 0"),
    "x_other_width": ({"x": torch.zeros(2, 5)}, "x (2, 5)"),
    "other_dtype": ({"x": torch.zeros(2, 4, dtype=BF16)}, "torch.bfloat16"),
    "frozen": ({"w": torch.zeros(3, 4, requires_grad=True)}, "frozen w"),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(changes, said):
    arguments = {
        "x": torch.zeros(2, 4),
        "w": torch.zeros(3, 4),
        "adapters": [RowAdapter(torch.zeros(2, 4), torch.zeros(3, 2), 1.0)],
        "row_adapters": [0, 0],
    }
    with pytest.raises(ValueError, match=re.escape(said)):
        lora_linear_rows(**(arguments | changes))
