"""Bytes that the storage kernels move, against closed forms: packed weights are read once, results are written once."""

import pytest
import torch
import triton

from fastpeft.kernels import nf4
from fastpeft.kernels.int8 import int8_dequantize
from fastpeft.reference import nf4 as reference

cdiv = triton.cdiv
BF16, F32 = torch.bfloat16, torch.float32
SIZES = [(64, 512), (33, 97), (7, 130)]
IDS = ["aligned", "odd", "blocks_cross_rows"]
EACH_SIZE = pytest.mark.parametrize(("n", "k"), SIZES, ids=IDS)


@pytest.fixture(autouse=True)
def _interpreted(device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")


def stored(n, k, blocksize, nested):
    packed, absmax = reference.quantize(torch.randn(n, k), "nf4", blocksize)
    rest = ()
    if nested:
        absmax, scales, offset = reference.quantize_absmax(absmax)
        rest = (reference.dynamic_table(), scales, offset, 256)
    return nf4.Packed(packed, absmax, reference.codes("nf4"), (n, k), blocksize, *rest)


def absmax_bytes(reads, programs, nested):
    """`reads` scales: 4 bytes each, or 1 of a code, 4 of the table and 4 of the nested scale, and one offset a program."""
    if not nested:
        return {("absmax_ptr", "load"): 4 * reads}
    return {
        ("absmax_ptr", "load"): reads,
        ("nested_code_ptr", "load"): 4 * reads,
        ("nested_absmax_ptr", "load"): 4 * reads,
        ("nested_offset_ptr", "load"): 4 * programs,
    }


@pytest.mark.parametrize("nested", [False, True], ids=["float_absmax", "nested"])
@pytest.mark.parametrize("blocksize", [64, 4096])
@EACH_SIZE
def test_dequantize_reads_packed_once_and_writes_once(n, k, blocksize, nested, probe):
    w = stored(n, k, blocksize, nested)
    nf4.nf4_dequantize(w, BF16)
    (launch,) = probe.launches
    blocks = w.absmax.numel()
    programs = cdiv(blocks, max(1, nf4._DEQUANTIZE_BYTES // (blocksize // 2)))
    assert launch.asked == {
        ("packed_ptr", "load"): cdiv(n * k, 2),
        ("codes_ptr", "load"): programs * 16 * 4,
        ("out_ptr", "store"): n * k * 2,
    } | absmax_bytes(blocks, programs, nested)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@EACH_SIZE
def test_quantize_reads_w_once(n, k, dtype, probe):
    bounds, order = reference.ranks("nf4")
    nf4.nf4_quantize(torch.randn(n, k).to(dtype), bounds, order, 64)
    (launch,) = probe.launches
    blocks = cdiv(n * k, 64)
    programs = cdiv(blocks, nf4._QUANTIZE_BYTES // 32)
    assert launch.asked == {
        ("w_ptr", "load"): n * k * dtype.itemsize,
        ("bounds_ptr", "load"): programs * 15 * 4,
        ("order_ptr", "load"): programs * 16,
        ("packed_ptr", "store"): cdiv(n * k, 2),
        ("absmax_ptr", "store"): blocks * 4,
    }


@pytest.mark.parametrize("nested", [False, True], ids=["float_absmax", "nested"])
@pytest.mark.parametrize("blocksize", [64, 512])
@pytest.mark.parametrize("r", [5, 80])
def test_merge_reads_packed_once_and_writes_once(r, blocksize, nested, probe):
    """Rows that end with a block. W itself is written nowhere else; b and a are read once per tile column and row."""
    n, k = 70, 512
    w = stored(n, k, blocksize, nested)
    nf4.nf4_merge(w, torch.randn(r, k).bfloat16(), torch.randn(n, r).bfloat16(), scale=1.0, dtype=BF16)
    (launch,) = probe.launches
    tiles_n, tiles_k = cdiv(n, nf4._MERGE_TILE.block_m), cdiv(k, nf4._MERGE_TILE.block_k)
    scales = n * k // min(blocksize, nf4._MERGE_TILE.block_k)
    assert launch.asked == {
        ("packed_ptr", "load"): n * k // 2,
        ("codes_ptr", "load"): tiles_n * tiles_k * 16 * 4,
        ("a_ptr", "load"): tiles_n * r * k * 2,
        ("b_ptr", "load"): tiles_k * n * r * 2,
        ("out_ptr", "store"): n * k * 2,
    } | absmax_bytes(scales, tiles_n * tiles_k, nested)


def test_merge_of_blocks_that_cross_rows_asks_twice_for_a_byte_and_fetches_it_once(probe):
    n, k, r = 33, 97, 5
    w = stored(n, k, 64, False)
    nf4.nf4_merge(w, torch.randn(r, k).bfloat16(), torch.randn(n, r).bfloat16(), scale=1.0, dtype=BF16)
    (launch,) = probe.launches
    assert launch.asked["packed_ptr", "load"] == n * k
    assert launch.unique_bytes(("packed_ptr", "load")) <= (n * k // 2 + 63) // 32 * 32
    assert launch.asked["out_ptr", "store"] == n * k * 2


@EACH_SIZE
def test_int8_dequantize_reads_q_once(n, k, probe):
    int8_dequantize(torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n), BF16)
    (launch,) = probe.launches
    block_k = min(2048, triton.next_power_of_2(k))
    assert launch.asked == {
        ("q_ptr", "load"): n * k,
        ("row_absmax_ptr", "load"): cdiv(k, block_k) * n * 4,
        ("out_ptr", "store"): n * k * 2,
    }


def test_no_kernel_uses_atomics(probe):
    w = stored(8, 64, 64, True)
    nf4.nf4_dequantize(w, BF16)
    nf4.nf4_merge(w, torch.randn(2, 64), torch.randn(8, 2), scale=1.0, dtype=F32)
    nf4.nf4_quantize(torch.randn(8, 64), *reference.ranks("nf4"), 64)
    int8_dequantize(torch.ones(8, 64, dtype=torch.int8), torch.ones(8), F32)
    assert len(probe.launches) == 4
    assert {kind for launch in probe.launches for _, kind in launch.asked} == {"load", "store"}
