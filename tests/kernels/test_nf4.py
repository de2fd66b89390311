"""The 4-bit and 8-bit storage kernels: the bits of the reference, and the merge against a float64 oracle and eager code."""

from dataclasses import dataclass

import pytest
import torch

from fastpeft.kernels import nf4
from fastpeft.kernels.int8 import int8_dequantize
from fastpeft.reference import nf4 as reference
from tests.tolerance import assert_bits_equal, assert_no_worse

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    name: str
    N: int
    K: int
    G: int = 64
    dtype: torch.dtype = BF16
    quant_type: str = "nf4"
    nested: bool = False
    R: int = 8
    adapter_dtype: torch.dtype | None = None
    layout: str = "contiguous"


CASES = [
    Case("aligned", 64, 256),
    Case("aligned-nested", 64, 256, nested=True),
    Case("fp32-nested-fp4", 64, 128, dtype=F32, nested=True, quant_type="fp4"),
    Case("fp16", 64, 192, dtype=F16),
    Case("blocks-of-32", 65, 96, G=32, nested=True),
    Case("blocks-of-256-cross-tiles", 65, 512, G=256, nested=True),
    Case("blocks-of-4096-in-long-rows", 2, 4096, G=4096),
    Case("blocks-of-4096-cross-rows", 5, 1000, G=4096),
    Case("blocks-cross-rows", 33, 130, nested=True),
    Case("odd", 33, 97, R=5),
    Case("odd-fp32-nested", 33, 97, dtype=F32, nested=True, R=5),
    Case("odd-fp4-fp16", 3, 1367, dtype=F16, quant_type="fp4", R=3),
    Case("one-of-each", 1, 1, R=1),
    Case("half-a-byte-short", 1, 63, R=1, nested=True),
    Case("many-nested-blocks", 130, 260, G=32, nested=True),
    Case("rank-40", 65, 128, R=40),
    Case("rank-200", 40, 64, R=200),
    Case("fp32-adapters", 65, 128, adapter_dtype=F32),
    Case("bf16-adapters-of-an-fp32-merge", 65, 128, dtype=F32, adapter_dtype=BF16),
    Case("transposed-adapters", 33, 97, R=5, layout="transposed"),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def stored(case: Case, device) -> nf4.Packed:
    """A quantised random weight, by the reference."""
    w = torch.randn(case.N, case.K) * case.K**-0.5
    packed, absmax = reference.quantize(w, case.quant_type, case.G)
    nested = ()
    if case.nested:
        absmax, scales, offset = reference.quantize_absmax(absmax)
        nested = (reference.dynamic_table().to(device), scales.to(device), offset.to(device))
    codes = reference.codes(case.quant_type).to(device)
    tensors = (packed.to(device), absmax.to(device), codes)
    return nf4.Packed(*tensors, (case.N, case.K), case.G, *nested, *((256,) if nested else ()))


def dequantized(case: Case, w: nf4.Packed, dtype) -> torch.Tensor:
    absmax = w.absmax.cpu()
    if case.nested:
        absmax = reference.dequantize_absmax(absmax, w.nested_absmax.cpu(), w.nested_code.cpu(), w.nested_offset.cpu())
    return reference.dequantize(w.packed.cpu(), absmax, case.quant_type, case.G, w.shape, dtype)


def adapters(case: Case, device) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = case.adapter_dtype or case.dtype
    a = (torch.randn(case.R, case.K) * case.K**-0.5).to(device, dtype)
    b = (torch.randn(case.N, case.R) * case.R**-0.5).to(device, dtype)
    if case.layout == "transposed":
        return a.t().contiguous().t(), b.t().contiguous().t()
    return a, b


@EACH_CASE
def test_dequantize(case, device):
    w = stored(case, device)
    before = [tensor.clone() for tensor in w if isinstance(tensor, torch.Tensor)]
    for dtype in {case.dtype, F32}:
        exact = dequantized(case, w, dtype)
        assert_bits_equal(f"{dtype}", nf4.nf4_dequantize(w, dtype), exact)
        out = torch.full(w.shape, float("nan"), dtype=dtype, device=device)
        assert nf4.nf4_dequantize(w, dtype, out=out) is out
        assert_bits_equal(f"out {dtype}", out, exact)
    for was, now in zip(before, (tensor for tensor in w if isinstance(tensor, torch.Tensor))):
        assert_bits_equal("an input", now, was)


@EACH_CASE
def test_quantize(case, device):
    w = (torch.randn(case.N, case.K) * torch.logspace(-4, 3, case.N)[:, None]).to(case.dtype)
    w[case.N // 2] = 0.0
    bounds, order = (part.to(device) for part in reference.ranks(case.quant_type))
    packed, absmax = nf4.nf4_quantize(w.to(device), bounds, order, case.G)
    expected, expected_absmax = reference.quantize(w, case.quant_type, case.G)
    assert_bits_equal("packed", packed, expected)
    assert_bits_equal("absmax", absmax, expected_absmax)


@pytest.mark.parametrize("quant_type", reference.QUANT_TYPES)
def test_quantize_at_and_beside_every_bound(quant_type, device):
    """A tie goes to the lower code; the product with the reciprocal of absmax is rounded, not fused or approximated."""
    bounds, order = reference.ranks(quant_type)
    values = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))])
    absmax = torch.cat([torch.tensor([1.0, 4.0, 1e-30, 1e-39, 3e38]), torch.rand(59) + 0.1])
    w = torch.zeros(64, 64)
    w[:, : len(values)], w[:, -1] = values * absmax[:, None], absmax
    packed, got_absmax = nf4.nf4_quantize(w.to(device), bounds.to(device), order.to(device), 64)
    assert_bits_equal("packed", packed, reference.quantize(w, quant_type, 64)[0])
    assert_bits_equal("absmax", got_absmax, absmax)


@EACH_CASE
def test_merge_no_worse_than_eager(case, device):
    w = stored(case, device)
    a, b = adapters(case, device)
    got = nf4.nf4_merge(w, a, b, scale=1.7, dtype=case.dtype)
    a, b = a.cpu(), b.cpu()
    exact = dequantized(case, w, F32).double() + 1.7 * b.double() @ a.double()
    eager = dequantized(case, w, case.dtype) + (1.7 * b.to(case.dtype)) @ a.to(case.dtype)
    assert_no_worse("w'", got.cpu(), exact, eager)
    again = torch.full(w.shape, float("nan"), dtype=case.dtype, device=device)
    assert nf4.nf4_merge(w, a.to(device), b.to(device), scale=1.7, dtype=case.dtype, out=again) is again
    assert_bits_equal("the second run", again, got)


@pytest.mark.parametrize("name", ["aligned-nested", "blocks-of-256-cross-tiles", "odd-fp32-nested"])
def test_merging_nothing_gives_the_dequantised_weight(name, device):
    case = next(case for case in CASES if case.name == name)
    w = stored(case, device)
    a, b = adapters(case, device)
    got = nf4.nf4_merge(w, a, torch.zeros_like(b), scale=1.7, dtype=case.dtype)
    assert_bits_equal("w'", got, dequantized(case, w, case.dtype))


@pytest.mark.parametrize("shape", [(4, 64), (33, 97), (1, 1), (5, 2050)], ids=str)
def test_int8_dequantize(shape, device):
    q = torch.randint(-127, 128, shape, dtype=torch.int8)
    row_absmax = torch.rand(shape[0]) + 0.1
    for dtype in (F32, F16, BF16):
        expected = (q.float() * (row_absmax * (1.0 / 127.0))[:, None]).to(dtype)
        assert_bits_equal(f"{dtype}", int8_dequantize(q.to(device), row_absmax.to(device), dtype), expected)
