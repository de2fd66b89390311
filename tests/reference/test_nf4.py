"""The specification of 4-bit storage is bitsandbytes' own behaviour, bit for bit, and a few numbers worked out by hand."""

import pytest
import torch
from bitsandbytes import functional as bitsandbytes

from fastpeft.reference import nf4
from tests.tolerance import assert_bits_equal

CPU = torch.device("cpu")
SHAPES = [(4, 64), (33, 97), (7, 130), (1, 1), (1, 2), (3, 1367)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EACH_TYPE = pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)


def bitsandbytes_dequantized(packed, absmax, quant_type, blocksize, shape, dtype):
    """By its general code: its routine for CPUs takes w's rows for its blocks where K is no multiple of the block size.

    One column is the shape that makes it choose the general code; compiling that code is switched off.
    """
    with torch.compiler.set_stance("force_eager"):
        column = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed.view(-1, 1), absmax, blocksize, quant_type, (shape[0] * shape[1], 1), dtype
        )
    return column.view(shape)


@EACH_TYPE
def test_codes_are_bitsandbytes(quant_type):
    assert_bits_equal("codes", nf4.codes(quant_type), bitsandbytes.get_4bit_type(quant_type, device="cpu"))


def test_dynamic_table_is_bitsandbytes():
    assert_bits_equal("table", nf4.dynamic_table(), bitsandbytes.create_dynamic_map())


def test_by_hand():
    """One block of 32, 3 short of it: byte = high element, low element; a tie between two codes goes to the lower."""
    w = torch.zeros(1, 29)
    tie = (nf4.NF4[14] + nf4.NF4[15]) / 2
    w[0, :5] = torch.tensor([2.0, -2.0, 1.0, -0.1, 2 * tie])
    packed, absmax = nf4.quantize(w, "nf4", 32)
    assert absmax.tolist() == [2.0]
    assert packed.tolist() == [0xF0, 12 << 4 | 6, 14 << 4 | 7, *[0x77] * 12]  # 0.5 is nearer to 0.44 than to 0.56
    values = nf4.dequantize(packed, absmax, "nf4", 32, (1, 29), torch.float32)
    assert values[0, :3].tolist() == [2.0, -2.0, 2 * nf4.NF4[12]]
    assert not values[0, 5:].any()


@EACH_TYPE
def test_a_block_of_zeros(quant_type):
    packed, absmax = nf4.quantize(torch.zeros(2, 64), quant_type, 64)
    assert absmax.tolist() == [0.0, 0.0]
    assert set(packed.tolist()) == ({0x77} if quant_type == "nf4" else {0x00})
    assert not nf4.dequantize(packed, absmax, quant_type, 64, (2, 64), torch.float32).any()


@EACH_TYPE
@pytest.mark.parametrize("blocksize", nf4.BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_bitsandbytes(shape, dtype, blocksize, quant_type):
    w = torch.randn(shape).to(dtype)
    packed, absmax = nf4.quantize(w, quant_type, blocksize)
    expected, state = bitsandbytes.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
    assert_bits_equal("packed", packed, expected.view(-1))
    assert_bits_equal("absmax", absmax, state.absmax)
    for out in (*DTYPES, torch.float64):
        got = nf4.dequantize(packed, absmax, quant_type, blocksize, shape, out)
        assert_bits_equal("w", got, bitsandbytes_dequantized(packed, absmax, quant_type, blocksize, shape, out))


@EACH_TYPE
def test_equals_bitsandbytes_at_and_beside_every_bound(quant_type):
    """Each of the 15 bounds, and its two neighbours in float32, times a power of two and times a crooked absmax."""
    bounds, _ = nf4.ranks(quant_type)
    values = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))])
    for absmax in (1.0, 4.0, 0.7071, 1e-30):
        w = torch.zeros(1, 64)
        w[0, : len(values)], w[0, -1] = values * absmax, absmax
        expected, _ = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type=quant_type)
        assert_bits_equal(f"absmax {absmax}", nf4.quantize(w, quant_type, 64)[0], expected.view(-1))


@pytest.mark.parametrize("blocks", [2, 256, 1000])
def test_nested_absmax(blocks):
    """Scales and offset are bitsandbytes'; its 8-bit codes, which it looks up coarsely, differ by one in a few places."""
    absmax = torch.rand(blocks) + 0.5
    code, scales, offset = nf4.quantize_absmax(absmax)
    expected, state = bitsandbytes.quantize_blockwise(absmax - absmax.mean(), blocksize=nf4.NESTED_BLOCKSIZE)
    assert_bits_equal("offset", offset, absmax.mean())
    assert_bits_equal("scales", scales, state.absmax)
    assert (code.int() - expected.int()).abs().max() <= 1
    table = nf4.dynamic_table()
    got = nf4.dequantize_absmax(expected, scales, table, offset)
    assert_bits_equal("absmax", got, bitsandbytes.dequantize_blockwise(expected, state) + offset)
    nearest = (table - ((absmax - offset) / scales.repeat_interleave(256)[:blocks])[:, None]).abs().amin(1)
    mine = (table[code.long()] - (absmax - offset) / scales.repeat_interleave(256)[:blocks]).abs()
    assert torch.all(mine <= nearest + torch.finfo(torch.float32).eps)


def test_nested_absmax_of_equal_scales():
    """No spread at all, or one block alone: every scale is the offset, exactly."""
    for blocks in (1, 300):
        absmax = torch.full((blocks,), 0.25)
        code, scales, offset = nf4.quantize_absmax(absmax)
        assert_bits_equal("absmax", nf4.dequantize_absmax(code, scales, nf4.dynamic_table(), offset), absmax)
