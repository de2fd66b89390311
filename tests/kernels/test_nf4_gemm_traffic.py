"""Bytes that the in-loop 4-bit GEMM moves, counted access by access: packed weights, never a weight of size N K."""

import pytest
import torch
import triton

from fastpeft.kernels import nf4_gemm, nf4_tiling
from fastpeft.kernels.nf4 import Packed
from fastpeft.kernels.tiling import INTERPRETER, padded_rank

cdiv = triton.cdiv
BYTES = 2  # of bfloat16
FLOAT = 4  # of float32: absmax, codes, partial sums
WORD = 4  # of 8 packed weights, or of 4 quantised absmax
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
SIZES = [(5, 33, 256, 5), (16, 64, 128, 16), (67, 33, 128, 5), (70, 64, 64, 16)]
EACH_SIZE = pytest.mark.parametrize(("m", "n", "k", "r"), SIZES, ids=["few", "skinny", "tall-odd", "tall"])


@pytest.fixture(autouse=True)
def _interpreted(device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")


def draw(*shape):
    return torch.randn(*shape).bfloat16()


def weight(n, k, nested=False):
    packed, codes, blocks = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8), torch.randn(16), n * k // BLOCKSIZE
    if not nested:
        return Packed(packed, torch.rand(blocks), codes, (n, k), BLOCKSIZE)
    absmax, groups = torch.randint(0, 256, (blocks,), dtype=torch.uint8), cdiv(blocks, NESTED_BLOCKSIZE)
    double = (torch.rand(256), torch.rand(groups), torch.tensor(0.5), NESTED_BLOCKSIZE)
    return Packed(packed, absmax, codes, (n, k), BLOCKSIZE, *double)


def plan(op, m, n, k):
    """(tile, row tiles, column tiles, parts) of a GEMM with result [m, n] and contraction k."""
    config = nf4_tiling.choose_nf4(op, INTERPRETER, M=m, N=n, K=k, R=16, dtype=torch.bfloat16)
    row_tiles, column_tiles = cdiv(m, config.block_m), cdiv(n, config.block_n)
    parts = nf4_tiling.split_contraction(m, k, config, row_tiles * column_tiles, INTERPRETER)
    return config, row_tiles, column_tiles, parts


def low_rank_bytes(m_rows, column_tiles, row_tiles, n, r):
    return {
        ("s_ptr", "load"): column_tiles * m_rows * padded_rank(r) * BYTES,
        ("b_ptr", "load"): row_tiles * n * r * BYTES,
    }


def check(launches, op, m, n, k, r, *, bias):
    """All bytes of one GEMM with result [m, n]: in one launch, or in two with partial sums between them."""
    config, row_tiles, column_tiles, parts = plan(op, m, n, k)
    assert len(launches) == 1 + (parts > 1)
    programs = row_tiles * column_tiles * parts
    if op == "gemm":  # columns of the tile past n read row 0 of w
        weights = row_tiles * column_tiles * config.block_n * k
    else:  # so does the contraction past k
        weights = row_tiles * n * cdiv(k, config.block_k) * config.block_k
    blocks_side = config.block_k if op == "gemm" else config.block_n
    expected = {
        ("x_ptr", "load"): column_tiles * row_tiles * config.block_m * k * BYTES,  # rows past m read row 0
        ("w_ptr", "load"): weights // 2,
        ("absmax_ptr", "load"): weights // min(BLOCKSIZE, blocks_side) * FLOAT,
        ("codes_ptr", "load"): programs * 16 * FLOAT,
    }
    bias_bytes = {("bias_ptr", "load"): row_tiles * n * BYTES} if bias else {}
    if parts == 1:
        rows = row_tiles * config.block_m
        expected |= low_rank_bytes(rows, column_tiles, row_tiles, n, r) | bias_bytes
        assert launches[0].asked == expected | {("y_ptr", "store"): m * n * BYTES}
        return
    assert launches[0].asked == expected | {("y_ptr", "store"): parts * m * n * FLOAT}
    tile = nf4_tiling.SUM_TILE
    row_tiles, column_tiles = cdiv(m, tile.block_m), cdiv(n, tile.block_n)
    low_rank = low_rank_bytes(row_tiles * tile.block_m, column_tiles, row_tiles, n, r)
    stored = {("parts_ptr", "load"): parts * m * n * FLOAT, ("y_ptr", "store"): m * n * BYTES}
    assert launches[1].asked == low_rank | bias_bytes | stored


@EACH_SIZE
def test_forward_moves_packed_weights_once_per_row_of_tiles(m, n, k, r, probe):
    nf4_gemm.nf4_lora_gemm(draw(m, k), weight(n, k), draw(m, padded_rank(r)), draw(n, r), draw(n), precision="ieee")
    check(probe.launches, "gemm", m, n, k, r, bias=True)


@pytest.mark.parametrize("threshold", [0, 6554], ids=["whole", "dropout"])
@EACH_SIZE
def test_grad_x_moves_what_the_forward_moves(m, n, k, r, threshold, probe):
    dropout = {"seed": 3, "threshold": threshold, "precision": "ieee"}
    nf4_gemm.nf4_lora_grad_x(draw(m, n), weight(n, k), draw(m, padded_rank(r)), draw(r, k), **dropout)
    check(probe.launches, "grad", m, k, n, r, bias=False)


def test_nothing_of_the_weight_s_size_is_written(probe):
    m, n, k, r = 5, 96, 512, 4
    w, s = weight(n, k), draw(m, padded_rank(r))
    nf4_gemm.nf4_lora_gemm(draw(m, k), w, s, draw(n, r), None, precision="ieee")
    nf4_gemm.nf4_lora_grad_x(draw(m, n), w, s, draw(r, k), seed=3, threshold=6554, precision="ieee")
    stored = {key: count for launch in probe.launches for key, count in launch.asked.items() if "store" in key}
    assert max(stored.values()) < n * k, stored
    assert {kind for launch in probe.launches for _, kind in launch.asked} == {"load", "store"}


def test_double_quantisation_moves_a_quarter_of_the_scales_bytes(probe):
    """One word per block, which neighbouring blocks share: a sector of 32 bytes holds 32 of them, not 8."""
    m, n, k, r = 16, 64, 512, 16
    w = weight(n, k, nested=True)
    nf4_gemm.nf4_lora_gemm(draw(m, k), w, draw(m, padded_rank(r)), draw(n, r), None, precision="ieee")
    gemm = probe.launches[0]
    blocks = n * k // BLOCKSIZE
    assert gemm.asked["absmax_ptr", "load"] == blocks * WORD
    assert gemm.unique_bytes(("absmax_ptr", "load")) <= blocks + 64
    assert gemm.asked["nested_absmax_ptr", "load"] == blocks * FLOAT
    assert gemm.asked["w_ptr", "load"] == n * k // 2


def test_one_part_takes_one_launch(probe):
    """Up to one step of the contraction there is nothing to split: no partial sums, no second kernel."""
    nf4_gemm.nf4_lora_gemm(draw(1, 64), weight(8, 64), None, None, draw(8), precision="ieee")
    assert len(probe.launches) == 1
    assert ("s_ptr", "load") not in probe.launches[0].asked
