"""The norms' kernels: bytes against the closed form, rows that are looped over, parts of sums. Values: tests/ops/test_norm.py."""

import pytest
import torch
import triton

from fastpeft.kernels import norm as kernels
from fastpeft.kernels import norm_wide
from fastpeft.kernels.launch import target_of
from tests.ops.norm_cases import BF16, FP32, VARIANTS, draw, in_dtype, run
from tests.tolerance import assert_bits_equal, assert_no_worse

BYTES, NUMBER = 2, 4  # of bfloat16; of a float32 statistic
TRAINS = pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])


def backward(x, w, mean, rstd, needs, dy=None, dh=None, offset=0.0):
    dy = torch.randn_like(x) if dy is None else dy
    return kernels.norm_backward(dy, dh, x, w, mean, rstd, offset=offset, bias_dtype=w.dtype, needs=needs)


def forward(x, residual, w, bias, centred):
    return kernels.norm_forward(x, residual, w, bias, eps=1e-5, offset=0.0, centred=centred, dtype=x.dtype)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("m", "k"), [(37, 33), (5, 4096)])
def test_forward_reads_and_writes_once(m, k, residual, centred, probe, device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")
    x, w = torch.randn(m, k).bfloat16(), torch.randn(k).bfloat16()
    forward(x, x.clone() if residual else None, w, w.clone() if centred else None, centred)
    (once,) = probe.launches
    programs = triton.cdiv(m, kernels._tile(k, target_of(x.device)).block_m)
    expected = {
        ("x_ptr", "load"): m * k * BYTES,
        ("y_ptr", "store"): m * k * BYTES,
        ("w_ptr", "load"): programs * k * BYTES,
        ("rstd_ptr", "store"): m * NUMBER,
    }
    if residual:
        expected |= {("residual_ptr", "load"): m * k * BYTES, ("h_ptr", "store"): m * k * BYTES}
    if centred:
        expected |= {("bias_ptr", "load"): programs * k * BYTES, ("mean_ptr", "store"): m * NUMBER}
    assert once.asked == expected


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@TRAINS
@pytest.mark.parametrize(("m", "k"), [(301, 33), (13, 4096)])
def test_backward_reads_and_writes_once(m, k, trains, residual, centred, probe, device):
    """dy and h are read once, dx written once; a weight that trains adds one row per part, one that does not adds nothing."""
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")
    x, w, rstd = torch.randn(m, k).bfloat16(), torch.randn(k).bfloat16(), torch.rand(m)
    needs = (True, trains, trains and centred)
    backward(x, w, rstd.clone() if centred else None, rstd, needs, dh=x.clone() if residual else None)
    target = target_of(x.device)
    config = kernels._tile(k, target)
    parts, _ = kernels._parts(m, config.block_m, trains, target)
    assert parts == triton.cdiv(m, config.block_m) if not trains else parts <= 2 * target.processors
    expected = {
        ("dy_ptr", "load"): m * k * BYTES,
        ("h_ptr", "load"): m * k * BYTES,
        ("dx_ptr", "store"): m * k * BYTES,
        ("w_ptr", "load"): parts * k * BYTES,
        ("rstd_ptr", "load"): m * NUMBER,
    }
    expected |= {("dh_ptr", "load"): m * k * BYTES} if residual else {}
    expected |= {("mean_ptr", "load"): m * NUMBER} if centred else {}
    expected |= {("dw_ptr", "store"): parts * k * NUMBER} if trains else {}
    expected |= {("dbias_ptr", "store"): parts * k * NUMBER} if trains and centred else {}
    first, *sums = probe.launches
    assert first.asked == expected
    assert [one.asked[("parts_ptr", "load")] for one in sums] == [parts * k * NUMBER] * sum(needs[1:])


def test_a_weight_that_trains_alone_writes_no_dx(probe, device):
    x, w, rstd = (tensor.to(device) for tensor in (torch.randn(9, 33), torch.randn(33), torch.rand(9)))
    dx, dw, dbias = backward(x, w, None, rstd, (False, True, False))
    assert dx is None
    assert dbias is None
    assert torch.isfinite(dw).all()
    assert all(("dx_ptr", "store") not in one.asked for one in probe.launches)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, FP32)], ids=["bf16-fp32", "fp32"])
@pytest.mark.parametrize("k", [97, 64])
def test_rows_that_no_tile_holds(k, dtypes, variant, monkeypatch, device):
    """The loops over columns, made to run on short rows: tiles of 32, so that the last is partial or whole."""
    monkeypatch.setattr(kernels, "_WIDEST", 32)
    monkeypatch.setattr(kernels, "_WIDEST_BACKWARD", 32)
    monkeypatch.setattr(norm_wide, "_ROW", norm_wide.TileConfig(1, 1, 32, 1, 4, 1))
    monkeypatch.setattr(norm_wide, "_COLUMNS", norm_wide.TileConfig(2, 1, 32, 1, 4, 1))
    inputs, grads = draw(variant, (7, k), *dtypes, device)
    exact, eager = in_dtype(torch.float64, variant, inputs, grads), in_dtype(None, variant, inputs, grads)
    for name, value in run(variant, inputs, grads, impl="triton").items():
        assert_no_worse(name, value, exact[name], eager[name])


@pytest.mark.parametrize("k", [kernels._WIDEST, kernels._WIDEST + 16])
def test_the_widest_rows_of_both_ways(k, probe, device):
    variant = VARIANTS["rms-offset-residual"]
    inputs, grads = draw(variant, (2, k), BF16, BF16, device)
    exact, eager = in_dtype(torch.float64, variant, inputs, grads), in_dtype(None, variant, inputs, grads)
    for name, value in run(variant, inputs, grads, impl="triton").items():
        assert_no_worse(name, value, exact[name], eager[name])
    if device.type == "cpu":
        looped = bool(probe.launches_of("_norm_wide_kernel"))
        assert looped == (k > kernels._WIDEST)
        assert probe.launches_of("_norm_wide_backward_kernel")


def test_a_large_mean_cancels_nothing_in_the_loop(monkeypatch, device):
    monkeypatch.setattr(kernels, "_WIDEST", 32)
    monkeypatch.setattr(norm_wide, "_ROW", norm_wide.TileConfig(1, 1, 32, 1, 4, 1))
    x = (torch.randn(3, 97) + 1000).to(device)
    y, _, mean, _ = forward(x, None, None, None, True)
    wide = x.double()
    exact = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert_no_worse("y", y, exact, torch.nn.functional.layer_norm(x, (97,)))
    assert_no_worse("mean", mean, wide.mean(1), wide.mean(1).float())


def test_strides_are_passed_and_columns_with_a_stride_are_copied_first(device):
    wide = torch.randn(9, 80).to(device)
    w = torch.randn(40).to(device)
    expected = forward(wide[:, 8:48].contiguous(), None, w, None, False)
    got = forward(wide[:, 8:48], None, w, None, False)
    columns_apart = forward(wide[:, 8:48].t().contiguous().t(), None, w, None, False)
    for one, other, third in zip(expected, got, columns_apart):
        if one is not None:
            assert_bits_equal("rows apart", other, one)
            assert_bits_equal("columns apart", third, one)


def test_two_sums_have_the_same_bits(device):
    """No atomics: the parts are added in order."""
    x, w, dy = (torch.randn(*shape).to(device) for shape in ((301, 33), (33,), (301, 33)))
    rstd = torch.rand(301).to(device)
    first, second = (backward(x, w, rstd, rstd, (True, True, True), dy=dy) for _ in range(2))
    for one, other in zip(first, second):
        assert_bits_equal("gradient", one, other)


@pytest.mark.parametrize(("k", "block_m", "num_warps"), [(64, 32, 4), (576, 2, 4), (4096, 1, 8), (16384, 1, 16)])
def test_tiles(k, block_m, num_warps):
    """Short rows share a program; 16 elements per lane until 16 warps are in use."""
    config = kernels._tile(k, kernels.Target("sm_90", 132))
    assert (config.block_m, config.block_k, config.num_warps) == (block_m, triton.next_power_of_2(k), num_warps)
    assert kernels._tile(k, kernels.Target("gfx942", 304)).num_warps == num_warps // 2


def test_parts():
    """A frozen weight gives a program per tile; a sum gives two per processor, and covers every row."""
    target = kernels.Target("sm_90", 132)
    assert kernels._parts(8192, 1, False, target) == (8192, 1)
    assert kernels._parts(8192, 2, True, target) == (256, 32)
    assert kernels._parts(5, 2, True, target) == (3, 2)
