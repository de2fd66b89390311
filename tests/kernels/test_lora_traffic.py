"""Bytes that the LoRA kernels move, counted access by access, against closed forms: each large tensor is read once."""

import pytest
import torch
import triton

from fastpeft.kernels import lora
from fastpeft.kernels.tiling import INTERPRETER, choose

cdiv = triton.cdiv
SIZES = [(67, 65, 97, 5), (64, 96, 128, 16)]
IDS = ["odd", "aligned"]
BYTES = 2  # of bfloat16
PART = 4  # of float32 partial sums


@pytest.fixture(autouse=True)
def _interpreted(device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")


def draw(*shape):
    return torch.randn(*shape).bfloat16()


def tiles(op, m, n, r):
    return choose(op, INTERPRETER, M=m, N=n, R=r, dtype=torch.bfloat16)


@pytest.mark.parametrize("threshold", [0, 6554], ids=["whole", "dropout"])
@pytest.mark.parametrize(("m", "n", "k", "r"), SIZES, ids=IDS)
def test_lora_down_reads_x_once(m, n, k, r, threshold, probe):
    x, a = draw(m, k), draw(r, k)
    lora.lora_down(x, a, scale=1.0, seed=3, threshold=threshold, precision="ieee")
    down, total = probe.launches
    config, padded = tiles("down", m, r, r), lora.padded_rank(r)
    row_tiles = cdiv(m, config.block_m)
    parts = down.asked["s_ptr", "store"] // (m * padded * PART)
    assert down.asked == {
        ("x_ptr", "load"): row_tiles * config.block_m * k * BYTES,  # rows past M read row 0
        ("a_ptr", "load"): row_tiles * r * k * BYTES,
        ("s_ptr", "store"): parts * m * padded * PART,
    }
    assert parts > 1
    assert total.asked == {
        ("parts_ptr", "load"): parts * m * padded * PART,
        ("out_ptr", "store"): m * padded * BYTES,
    }


@pytest.mark.parametrize(("m", "n", "k", "r"), SIZES, ids=IDS)
def test_epilogue_reads_the_low_rank_factors_once_per_tile(m, n, k, r, probe):
    x, w, s, b, bias = draw(m, k), draw(n, k), draw(m, lora.padded_rank(r)), draw(n, r), draw(n)
    lora.lora_epilogue(x, w, s, b, bias, precision="ieee")
    (gemm,) = probe.launches
    row_tiles = cdiv(m, tiles("gemm", m, n, r).block_m)
    assert gemm.asked == gemm_bytes(m, n, k, r) | {("bias_ptr", "load"): row_tiles * n * BYTES}


@pytest.mark.parametrize(("m", "n", "k", "r"), SIZES, ids=IDS)
def test_a_gain_costs_a_second_output_and_no_second_read(m, n, k, r, probe):
    x, w, s, b = draw(m, k), draw(n, k), draw(m, lora.padded_rank(r)), draw(n, r)
    lora.lora_epilogue(x, w, s, b, None, gain=torch.ones(n), precision="ieee")
    (gemm,) = probe.launches
    row_tiles = cdiv(m, tiles("gemm", m, n, r).block_m)
    extra = {("gain_ptr", "load"): row_tiles * n * 4, ("z_ptr", "store"): m * n * BYTES}
    assert gemm.asked == gemm_bytes(m, n, k, r) | extra


@pytest.mark.parametrize("threshold", [0, 6554], ids=["whole", "dropout"])
@pytest.mark.parametrize(("m", "n", "k", "r"), SIZES, ids=IDS)
def test_grad_x_moves_what_the_forward_moves(m, n, k, r, threshold, probe):
    dy, w, ds, a = draw(m, n), draw(n, k), draw(m, lora.padded_rank(r)), draw(r, k)
    lora.lora_grad_x(dy, w, ds, a, seed=3, threshold=threshold, precision="ieee")
    (gemm,) = probe.launches
    assert gemm.asked == gemm_bytes(m, k, n, r)


def gemm_bytes(m, n, k, r):
    """y [m, n] = x [m, k] w^T + s b^T: no tensor besides these five is touched."""
    config = tiles("gemm", m, n, r)
    row_tiles, column_tiles = cdiv(m, config.block_m), cdiv(n, config.block_n)
    rows = row_tiles * config.block_m
    return {
        ("x_ptr", "load"): column_tiles * rows * k * BYTES,
        ("w_ptr", "load"): row_tiles * n * k * BYTES,
        ("s_ptr", "load"): column_tiles * rows * lora.padded_rank(r) * BYTES,
        ("b_ptr", "load"): row_tiles * n * r * BYTES,
        ("y_ptr", "store"): m * n * BYTES,
    }


@pytest.mark.parametrize(("m", "n", "k", "r"), SIZES, ids=IDS)
def test_grad_s_and_b_take_one_pass_over_dy(m, n, k, r, probe):
    padded = lora.padded_rank(r)
    lora.lora_grad_s_b(draw(m, n), draw(n, r), draw(m, padded), scale=1.0, threshold=0, precision="ieee")
    both, sum_ds, sum_db = probe.launches
    column_tiles = cdiv(n, tiles("grad_s_b", m, n, r).block_n)
    parts = both.asked["db_ptr", "store"] // (r * n * PART)
    assert both.asked == {
        ("dy_ptr", "load"): m * n * BYTES,
        ("b_ptr", "load"): parts * n * r * BYTES,
        ("s_ptr", "load"): column_tiles * m * padded * BYTES,
        ("ds_ptr", "store"): column_tiles * m * padded * PART,
        ("db_ptr", "store"): parts * r * n * PART,
    }
    assert both.unique_bytes(("dy_ptr", "load")) <= (m * n * BYTES + 63) // 32 * 32
    assert parts > 1
    assert sum_ds.asked == {
        ("parts_ptr", "load"): column_tiles * m * padded * PART,
        ("out_ptr", "store"): m * padded * BYTES,
    }
    assert sum_db.asked == {("parts_ptr", "load"): parts * r * n * PART, ("out_ptr", "store"): n * r * BYTES}


@pytest.mark.parametrize("threshold", [0, 6554], ids=["whole", "dropout"])
@pytest.mark.parametrize(("m", "n", "k", "r"), SIZES, ids=IDS)
def test_grad_a_reads_x_once(m, n, k, r, threshold, probe):
    padded = lora.padded_rank(r)
    lora.lora_grad_a(draw(m, k), draw(m, padded), draw(r, k), seed=3, threshold=threshold, precision="ieee")
    first = probe.launches[0]
    column_tiles = cdiv(k, tiles("grad_a", m, k, r).block_k)
    parts = probe.launches[1].asked["parts_ptr", "load"] // (r * k * PART) if len(probe.launches) > 1 else 1
    assert first.asked == {
        ("x_ptr", "load"): m * k * BYTES,
        ("ds_ptr", "load"): column_tiles * m * padded * BYTES,
        ("da_ptr", "store"): parts * r * k * (PART if parts > 1 else BYTES),
    }


def test_a_tensor_that_one_part_covers_is_written_without_partial_sums(probe):
    """Small problems take one launch: partial sums exist only where programs share a result."""
    ds, db = lora.lora_grad_s_b(draw(8, 8), draw(8, 2), draw(8, 16), scale=1.0, threshold=0, precision="ieee")
    da = lora.lora_grad_a(draw(8, 8), ds, draw(2, 8), seed=0, threshold=0, precision="ieee")
    assert len(probe.launches) == 2
    assert db.shape == (8, 2)
    assert da.shape == (2, 8)


def test_no_kernel_uses_atomics(probe):
    m, n, k, r = SIZES[0]
    x, w, a, b, dy = draw(m, k), draw(n, k), draw(r, k), draw(n, r), draw(m, n)
    dropout = {"seed": 3, "threshold": 6554, "precision": "ieee"}
    s = lora.lora_down(x, a, scale=1.0, **dropout)
    lora.lora_epilogue(x, w, s, b, None, precision="ieee")
    ds, _ = lora.lora_grad_s_b(dy, b, s, scale=1.0, threshold=6554, precision="ieee")
    lora.lora_grad_x(dy, w, ds, a, **dropout)
    lora.lora_grad_a(x, ds, a, **dropout)
    kinds = {kind for launch in probe.launches for _, kind in launch.asked}
    assert kinds == {"load", "store"}
