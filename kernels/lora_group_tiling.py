"""Which members of a group share a launch, and the tiles of the kernels over groups (lora_group.py, lora_group_grad.py)."""

import dataclasses
from collections.abc import Sequence

import torch

from fastpeft.kernels.tiling import SKINNY_ROWS, Target, TileConfig, choose, family_of

MAX_MEMBERS = 4  # pointers in the kernels' signatures
MAX_COLUMNS = 512  # padded ranks whose sums one program holds in registers
# Arguments that change with the step, or whose divisibility changes nothing: a new value compiles nothing.
PER_CALL = ["M", "rows_per_part"] + [f"{name}{i}" for name in ("R", "seed", "threshold") for i in range(MAX_MEMBERS)]
MOST_SUMS = 64  # per lane, where as many others are alive
_SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227}  # by families
_OTHER_SHARED_KIB = 64


def filled(values, fill=0):
    """One value per pointer slot of a kernel's signature."""
    return (*values, *(fill,) * (MAX_MEMBERS - len(values)))


def batches_of(columns: Sequence[int]) -> list[list[int]]:
    """Indices of the members that share a launch; members with 0 columns have no adapter and are left out."""
    batches: list[list[int]] = []
    room = -1
    for index, width in enumerate(columns):
        if not width:
            continue
        if room < width or len(batches[-1]) == MAX_MEMBERS:
            batches.append([])
            room = MAX_COLUMNS
        batches[-1].append(index)
        room -= width
    return batches


def down_tile(
    target: Target, m: int, columns: int, dtype: torch.dtype, adapter_bytes: int, dropout: bool
) -> TileConfig:
    """Tile of group_down: as deep along K as shared memory for two programs allows, at most 96 sums per thread.

    With dropout the bits of a mask live in registers too: half as deep.
    """
    family = family_of(target.arch)
    if family == "gfx1100" and dtype != torch.float32 and columns > 64:
        # 64 bytes of every a: 124 to 236 registers, 28 KiB or less. A depth of 64 spills 445 at 384 columns, of float32 even
        # past the 64 KiB there are.
        if columns <= 128:
            return TileConfig(64, 1, 32, 1, 4, 2)
        return TileConfig(32, 1, 64 // adapter_bytes, 1, 8, 2)
    if not _is_known(target):  # float32 on gfx1100 at a depth of 64 spills 236 registers, at 32 none
        return TileConfig(32, 1, 32 if family == "gfx1100" and dtype == torch.float32 else 64, 1, 4, 2)
    block_m = 16 if m <= SKINNY_ROWS else 32 if dtype == torch.float32 or columns > MAX_COLUMNS else 64
    warps = 2 if block_m == 16 and columns <= 64 else 4 if columns <= 128 else 8
    depths = ((128, 4), (64, 4), (64, 3), (32, 4), (32, 3))[dropout and not _is_amd(target) :]
    if family == "sm_86":
        # 99 KiB are one tile of 32 x 384 float32 adapters. 64 rows by 128 columns spill 4 registers with 4 warps, none with
        # 8; 64 rows by 48 columns with three masks spill 3 with 4 warps and 10 with 8, 32 rows with 2 warps none.
        if dropout and columns <= 64 and block_m == 64:
            return TileConfig(32, 1, 64, 1, 2, 3)
        warps = 8 if columns > 64 and block_m == 64 else warps
        depths = (*depths, (32, 2))
    for block_k, stages in depths:
        buffers = 1 if _is_amd(target) else stages - 1 if family == "sm_86" else stages
        if buffers * block_k * (block_m * dtype.itemsize + columns * adapter_bytes) <= _shared(target) // 2:
            break
    return TileConfig(block_m, 1, block_k, 1, warps, 2 if _is_amd(target) else stages)


def grad_a_tile(target: Target, columns: int, dtype: torch.dtype, dropout: bool) -> TileConfig:
    """Tile of group_grad_a: at most 128 sums per thread, on gfx1100 96, as its operands take twice the registers."""
    if family_of(target.arch) == "gfx1100" and dtype != torch.float32:
        # 152 to 250 registers. 32 rows by 32 columns of x spill 94 at 384 ranks, and at 48 ranks repeat every product 4 times
        if columns <= 128:
            return TileConfig(32, 1, 128 if columns <= 64 else 64, 1, 4, 2)
        return TileConfig(16, 1, 32 if dropout or columns > 384 else 64, 1, 8, 2)
    if not _is_known(target):
        return TileConfig(32, 1, 32, 1, 4, 2)
    if _is_amd(target):
        block_k = 256 if columns <= 64 and not dropout else 128 if columns <= 256 else 64
        if dtype == torch.float32:
            return TileConfig(64 if columns <= 64 else 32, 1, 64, 1, 4, 2)
        return TileConfig(32, 1, block_k, 1, 4, 2)
    if dtype == torch.float32:
        return TileConfig(32, 1, 64, 1, 4 if columns <= 64 else 8, 3)
    if columns <= 64:
        return TileConfig(32, 1, 128, 1, 8, 4) if dropout else TileConfig(32, 1, 256, 1, 4, 4)
    block_k = 256 if columns <= 128 else 128 if columns <= 256 else 64
    return TileConfig(32, 1, block_k // 2 if dropout else block_k, 1, 8, 4)


def grad_x_tile(target: Target, m: int, k: int, r: int, dtype: torch.dtype, drops: int, add: bool) -> TileConfig:
    """Tile of group_grad_x: that of lora.py's GEMM, but for what needs a second tile of float32 in registers.

    That is the low-rank part of a second member with dropout, or the tile of `add`: with 128 sums per thread they spill 140
    to 1660 registers on sm_90. On sm_80, sm_86 and gfx942 operands of large ranks are enough for that.
    """
    family = family_of(target.arch)
    config = choose("gemm_dropout" if drops else "gemm", target, M=m, N=k, R=r, dtype=dtype)
    sums = config.block_m * config.block_n // (32 * config.num_warps)
    if drops and sums >= MOST_SUMS and family == "gfx1100":
        # With dropout 128x128 spills 5 registers at R = 16 and 15 at R = 128; this takes 185 and 157.
        return dataclasses.replace(config, block_m=config.block_m // 2)
    if drops and sums >= MOST_SUMS and family in ("sm_80", "sm_86") and r > 64:
        # 128x128 with 8 warps spills 2 registers on sm_80 with one mask or three; this none, and two programs fit.
        return TileConfig(64, 128, 32, min(config.block_r, 32), 4, 4)
    # sm_86's rows have 4 warps for 128x128: with three members those spill 24 at R = 32 and 66 at R = 64.
    large_rank = r > {"sm_80": 64, "sm_86": 16, "gfx942": 64}.get(family, r)
    crowded = drops > 1 or add or large_rank
    if crowded and sums > MOST_SUMS and _is_known(target):
        block_r = min(config.block_r, 32)
        if large_rank and family in ("sm_80", "sm_86"):
            return TileConfig(128, 128, 32, block_r, 8, 4)
        return TileConfig(128, 128, 64, block_r, 8, min(3, config.num_stages))
    if sums > 2 * MOST_SUMS:  # 256x256 spills with three members
        return dataclasses.replace(config, block_m=config.block_m // 2)
    return config


def _is_known(target: Target) -> bool:
    return target.arch.startswith(("sm_", "gfx9"))  # gfx1100 has rows of its own, or takes those of an unknown GPU


def _shared(target: Target) -> int:
    return 1024 * _SHARED_KIB.get(family_of(target.arch), _OTHER_SHARED_KIB)


def _is_amd(target: Target) -> bool:
    return target.arch.startswith("gfx9")
