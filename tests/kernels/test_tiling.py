"""Tile choice is pure, total, and within what each GPU has."""

import math

import pytest
import torch
import triton

from fastpeft.kernels import tiling
from fastpeft.kernels.launch import dot_precision, launch, record_launches, rows_contiguous, target_of
from fastpeft.kernels.tiling import GENERIC, INTERPRETER, Target, choose, padded_rank, parts_along

OPERATIONS = ["gemm", "gemm_dropout", "gemm_gain", "down", "down_dropout", "grad_s_b", "grad_a", "grad_a_dropout"]
TARGETS = {
    "sm_75": Target("sm_75", 40),
    "sm_80": Target("sm_80", 108),
    "sm_86": Target("sm_86", 84),
    "sm_90": Target("sm_90", 132),
    "sm_100": Target("sm_100", 148),
    "sm_120": Target("sm_120", 188),
    "sm_999": Target("sm_999", 500),
    "gfx942": Target("gfx942", 304),
    "gfx1100": Target("gfx1100", 96),
    "interpreter": INTERPRETER,
    "generic": GENERIC,
}
SHARED_KIB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def loop_bytes(op: str, config: tiling.TileConfig, itemsize: int) -> int:
    """Shared memory of a pipelined loop's tiles: a lower bound of what the kernel takes."""
    m, n, k, r = config.block_m, config.block_n, config.block_k, config.block_r
    tile = {"gemm": (m + n) * k, "down": (m + r) * k, "grad_s_b": m * n, "grad_a": m * k}[
        op.removesuffix("_dropout").removesuffix("_gain")
    ]
    return tile * itemsize * max(1, config.num_stages - 1)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_size_has_a_tile_that_fits(op, target):
    for dtype in DTYPES:
        for r in (1, 5, 16, 17, 40, 64, 128, 200, 1024):
            for m in (1, 16, 33, 512, 8192, 10**6):
                config = choose(op, target, M=m, N=4096, R=r, dtype=dtype)
                sides = (config.block_m, config.block_n, config.block_k, config.block_r)
                assert all(side == triton.next_power_of_2(side) for side in sides), config
                assert padded_rank(r) % config.block_r == 0, f"R={r}: {config}"
                assert config.block_r >= 16, f"R={r}: {config}"
                limit = SHARED_KIB.get(target.arch, 48) * 1024
                assert loop_bytes(op, config, dtype.itemsize) <= limit, f"{target.arch} {op} R={r} {dtype}: {config}"


def test_more_rows_take_taller_tiles_until_processors_are_full():
    heights = [
        choose("gemm", TARGETS["sm_90"], M=m, N=4096, R=16, dtype=torch.bfloat16).block_m for m in (16, 512, 1024, 8192)
    ]
    assert heights == [16, 64, 128, 128]
    wide = choose("gemm", TARGETS["sm_90"], M=8192, N=4096, R=16, dtype=torch.bfloat16)
    assert (wide.block_n, wide.num_warps) == (256, 8)


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t != INTERPRETER], ids=lambda t: t.arch)
@pytest.mark.parametrize("op", ["gemm", "gemm_dropout", "down", "down_dropout"])
def test_few_rows_take_a_tile_of_16(op, target):
    for r in (4, 64, 256):
        for dtype in DTYPES:
            assert choose(op, target, M=1, N=4096, R=r, dtype=dtype).block_m == 16


def test_unknown_gpus_take_small_tiles():
    config = choose("gemm", TARGETS["sm_999"], M=8192, N=8192, R=16, dtype=torch.bfloat16)
    assert config == choose("gemm", GENERIC, M=8192, N=8192, R=16, dtype=torch.bfloat16)


@pytest.mark.parametrize(("r", "expected"), [(1, 16), (16, 16), (17, 32), (40, 64), (128, 128), (200, 256)])
def test_padded_rank(r, expected):
    assert padded_rank(r) == expected


@pytest.mark.parametrize("length", [1, 31, 32, 33, 97, 4096, 11008])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("others", [1, 7, 500])
def test_parts_cover_the_length_without_an_empty_one(length, block, others):
    target = TARGETS["sm_90"]
    parts, per_part = parts_along(length, block, others, target)
    assert per_part % block == 0
    assert (parts - 1) * per_part < length <= parts * per_part
    most = math.ceil(length / block)
    wanted = math.ceil(2 * target.processors / others)
    assert parts <= min(most, wanted)
    assert 2 * parts >= min(most, wanted), f"{parts} parts where {min(most, wanted)} were wanted"


def test_tf32_is_asked_for_only_where_it_exists():
    ampere, turing, rdna = Target("sm_80", 108), Target("sm_75", 40), Target("gfx1100", 96)
    assert dot_precision("tf32", torch.float32, ampere) == "tf32"
    assert dot_precision("tf32", torch.bfloat16, ampere) == "ieee"
    assert dot_precision("ieee", torch.float32, ampere) == "ieee"
    assert dot_precision("tf32", torch.float32, turing) == "ieee"
    assert dot_precision("tf32", torch.float32, rdna) == "ieee"


def test_only_a_strided_last_axis_is_copied():
    matrix = torch.randn(6, 8)
    for view in (matrix, matrix[::2], matrix[:, 1:5], matrix[:, :1]):
        assert rows_contiguous(view) is view
    for view in (matrix.t(), matrix[:, ::2], torch.ones(()).expand(3, 4)):
        copy = rows_contiguous(view)
        assert copy.stride(1) == 1
        assert torch.equal(copy, view)


def test_recording_launches_nothing_and_ends_with_its_block():
    config = choose("down", GENERIC, M=1, N=1, R=1, dtype=torch.float32)
    with record_launches(TARGETS["sm_90"]) as launches:
        assert target_of(torch.device("meta")) == TARGETS["sm_90"]
        launch(None, (2, 3), config, 4, 5, SIDE=6)
    (recorded,) = launches
    assert (recorded.grid, recorded.args, recorded.constexprs, recorded.config) == ((2, 3), (4, 5), {"SIDE": 6}, config)
