"""Int8Weight and quantize_int8: bitsandbytes' bytes, and the weights its Linear8bitLt multiplies with in training."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from bitsandbytes.nn import Linear8bitLt

from fastpeft.ops.int8 import Int8Weight, quantize_int8
from fastpeft.ops.weights import QuantizedWeight
from tests.tolerance import assert_bits_equal

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPES = [(4, 64), (33, 97), (1, 1), (5, 2050)]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_of_bitsandbytes(shape, dtype):
    w = torch.randn(shape).to(dtype)
    stored = quantize_int8(w)
    q, row_absmax, _ = bitsandbytes.int8_vectorwise_quant(w.half())
    assert_bits_equal("q", stored.q, q)
    assert_bits_equal("row_absmax", stored.row_absmax, row_absmax)
    assert stored.dtype == dtype


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_the_weights_that_linear8bitlt_multiplies_with(dtype):
    layer = Linear8bitLt(97, 33, bias=False, has_fp16_weights=False)
    w = torch.randn(33, 97)
    layer.weight.data.copy_(w)
    layer = layer.to("cpu").train()
    multiplied = layer(torch.eye(97, dtype=dtype)).t().contiguous()
    assert_bits_equal("w^", quantize_int8(w).dequantize(dtype), multiplied)


@pytest.mark.parametrize("impl", ["torch", "reference", pytest.param("triton", marks=pytest.mark.watched)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_implementations_agree(shape, impl, device):
    w = torch.randn(shape)
    stored = quantize_int8(w.to(device))
    factor = stored.row_absmax.cpu() * (1.0 / 127.0)
    product = stored.q.cpu().float() * factor[:, None]
    for dtype in (F32, F16, BF16) if impl == "triton" else (F32, F16, BF16, F64):
        assert_bits_equal(f"{dtype}", stored.dequantize(dtype, impl=impl), product.to(dtype))
        out = torch.full(shape, float("nan"), dtype=dtype, device=device)
        assert stored.dequantize(dtype, impl=impl, out=out) is out
        assert_bits_equal(f"out {dtype}", out, product.to(dtype))


def test_more_rows_than_one_chunk():
    stored = quantize_int8(torch.randn(130, 2050))
    for dtype in (F32, F16, F64):
        assert_bits_equal(f"{dtype}", stored.dequantize(dtype), stored.dequantize(dtype, impl="reference"))


def test_rows_of_zeros():
    w = torch.randn(3, 8)
    w[1] = 0
    stored = quantize_int8(w)
    assert stored.row_absmax[1] == 0
    assert not stored.q[1].any()
    assert_bits_equal("w^", stored.dequantize(F32)[1], torch.zeros(8))


def test_the_whole_of_a_weight():
    stored = quantize_int8(torch.randn(6, 9).t())
    assert isinstance(stored, QuantizedWeight)
    assert (stored.shape, stored.ndim, stored.quant_type, stored.device.type) == ((9, 6), 2, "int8", "cpu")
    assert stored.to("cpu") is stored
    assert {t.device.type for t in stored.to("meta").tensors().values()} == {"meta"}


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (7e4, "70000")])
def test_weights_that_float16_does_not_hold(value, shown):
    w = torch.randn(4, 5)
    w[2, 3] = value
    with pytest.raises(ValueError, match=rf"w\[2, 3\] = {shown}"):
        quantize_int8(w)


@pytest.mark.parametrize("w", [torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.int8)])
def test_quantize_refuses(w):
    with pytest.raises(ValueError, match="expected a floating w"):
        quantize_int8(w)


STORED = quantize_int8(torch.linspace(-1, 1, 12).view(3, 4))
DAMAGED = {
    "q_float": ({"q": STORED.q.float()}, "torch.float32"),
    "q_one_row": ({"q": STORED.q[:1]}, r"\(1, 4\)"),
    "q_strided": ({"q": STORED.q.repeat(1, 2)[:, ::2]}, "contiguous"),
    "row_absmax_half": ({"row_absmax": STORED.row_absmax.half()}, "float16"),
    "row_absmax_on_another_device": ({"row_absmax": STORED.row_absmax.to("meta")}, "on meta"),
    "row_absmax_nan": ({"row_absmax": torch.tensor([1.0, float("nan"), 1.0])}, "nan at row 1"),
    "row_absmax_negative": ({"row_absmax": torch.tensor([1.0, 1.0, -2.0])}, "-2.0 at row 2"),
    "dtype": ({"dtype": torch.int8}, "torch.int8"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_weight(name):
    changes, message = DAMAGED[name]
    with pytest.raises(ValueError, match=message) as error:
        replace(STORED, **changes)
    assert "\n" not in str(error.value)


def test_an_out_that_does_not_fit():
    for out in (torch.empty(3, 5), torch.empty(3, 4, dtype=BF16), torch.empty(4, 3).t()):
        with pytest.raises(ValueError, match=r"expected out \(3, 4\)"):
            STORED.dequantize(F32, out=out)


def test_construction():
    assert Int8Weight(STORED.q, STORED.row_absmax).dtype == F16
