"""Tile shapes: a pure function of (operation, target, sizes, dtype) over a literal table. Nothing is timed at run time.

Any size gets a configuration that runs: masks cover what a tile does not divide, large ranks are cut into chunks of
`block_r`, and a GPU without rows of its own takes those of the closest family that fits into its shared memory.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton


class Target(NamedTuple):
    """What tiles are chosen for: `arch` is "sm_90", "gfx942", "interpreter" or "generic"; processors are SMs or CUs."""

    arch: str
    processors: int


# Few processors, so that the interpreter's small problems split into several programs, as large ones do on a GPU.
INTERPRETER = Target("interpreter", 4)
# Another accelerator that Triton runs on: small tiles that fit anywhere.
GENERIC = Target("generic", 64)

MIN_PADDED_RANK = 16  # the smallest contraction of a tensor core's product
MIN_TILE_ROWS = 16  # of a tensor core's product
SKINNY_ROWS = 32  # up to here a kernel is bound by reading w or a, and takes its 16-row tile
PROGRAMS_PER_PROCESSOR = 2  # one pass over memory needs 64 KB in flight per SM: two programs of the tiles below
GROUP_M = 8  # row tiles that share w's column tile in L2


@dataclass(frozen=True)
class TileConfig:
    """One kernel's tile, in elements; sides that a kernel lacks are 1. block_r: the chunk of the rank one product takes.

    matrix_side: rows of one matrix instruction, AMD only; 0 is the compiler's choice.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = GROUP_M
    matrix_side: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What a launch passes beside warps and stages."""
        return {"matrix_instr_nonkdim": self.matrix_side} if self.matrix_side else {}


_T = TileConfig
_Rows = tuple[TileConfig, ...]  # from the largest tile to the smallest; one of 16 rows, if any, comes last

# {family: {operation: {largest padded rank: rows}}}, for float16 and bfloat16.
# Chosen with Triton 3.8.0 and its ptxas from static metrics of M=8192, N=K=4096: no row spills a register, all fit into
# shared memory; among those, y and dx by the tensor pipe's share of a loop iteration, one-pass kernels by instructions
# per element of the tensor they read, then by programs per SM. Measured instructions per element at R = 16 / 64 / 128:
#                 sm_80               sm_90               sm_100              gfx942
# down            1.4 / 2.4 / 4.4     1.4 / 1.6 / 1.8     1.9 / 1.7 / 2.0     1.7 / 2.4 / 3.8
# down, dropout  10.6 / 14.6 / 22.1  11.8 / 11.7 / 12.3  12.1 / 12.3 / 12.2  11.8 / 11.4 / 12.6
# grad_s_b        4.0 / 7.3 / 14.6*   3.3 / 4.8 / 9.0     3.7 / 5.3 / 9.4     4.4 / 8.1 / 12.6
# grad_a          2.5 / 3.8 / 6.1     2.3 / 2.5 / 2.7     2.3 / 2.4 / 3.0     3.3 / 5.1 / 8.6
# grad_a, dropout 12.1 / 15.1 / 20.8  13.3 / 12.6 / 12.5  13.2 / 12.6 / 12.6  14.3 / 16.2 / 22.1
# * two passes over dy, in chunks of 64: one chunk of 128 takes 255 registers and spills with float32 adapters.
# float32 adapters over half-precision x are part of the check: their tiles take twice the shared memory.
# The chunk of 32 ranks over 128x256 on sm_80: larger ones spill 2 to 104 registers in the epilogue. A gain ("gemm_gain")
# wants two roundings of one tile: 256x256 on sm_100 spills 1300, 128x128 with 4 warps on sm_80 81.
# Rejected: 4 warps on 128x256 (1500 to 2300 spilled stores), 256x256 with dropout on sm_100 (98), 128x256 with dropout at
# R = 64 on sm_80 (50), a whole chunk of 128 with dropout on sm_90 (240 KiB).
_SM_80 = {
    "gemm": {
        64: (_T(128, 256, 64, 32, 8, 3), _T(128, 128, 32, 64, 4, 4),
             _T(64, 128, 64, 64, 4, 4), _T(16, 64, 128, 64, 4, 4)),
        128: (_T(128, 256, 64, 32, 8, 3), _T(128, 128, 32, 128, 4, 4),
              _T(64, 128, 64, 128, 4, 4), _T(16, 64, 128, 128, 4, 4)),
    },
    "gemm_gain": {
        128: (_T(128, 256, 64, 32, 8, 3), _T(128, 128, 32, 64, 8, 4),
              _T(64, 128, 64, 64, 4, 4), _T(16, 64, 128, 64, 4, 4)),
    },
    "gemm_dropout": {
        16: (_T(128, 256, 64, 16, 8, 3), _T(128, 128, 32, 16, 4, 4),
             _T(64, 128, 64, 16, 4, 4), _T(16, 64, 128, 16, 4, 4)),
        64: (_T(128, 128, 32, 64, 4, 4), _T(64, 128, 64, 64, 4, 4), _T(16, 64, 128, 64, 4, 4)),
        128: (_T(128, 128, 64, 32, 8, 3), _T(64, 128, 64, 64, 4, 4), _T(16, 64, 128, 64, 4, 4)),
    },
    "down": {
        16: (_T(64, 1, 128, 16, 4, 4), _T(16, 1, 256, 16, 2, 4)),
        64: (_T(128, 1, 64, 64, 4, 4), _T(16, 1, 128, 64, 4, 4)),
        128: (_T(128, 1, 64, 128, 8, 4), _T(16, 1, 64, 128, 4, 4)),
    },
    "down_dropout": {
        16: (_T(64, 1, 128, 16, 4, 4), _T(16, 1, 256, 16, 2, 4)),
        64: (_T(64, 1, 64, 64, 4, 4), _T(16, 1, 128, 64, 4, 4)),
        128: (_T(64, 1, 64, 128, 8, 4), _T(16, 1, 64, 128, 4, 4)),
    },
    "grad_s_b": {16: (_T(32, 256, 1, 16, 4, 3),), 128: (_T(32, 256, 1, 64, 8, 3),)},
    "grad_a": {16: (_T(64, 1, 128, 16, 4, 4),), 64: (_T(32, 1, 256, 64, 4, 4),), 128: (_T(32, 1, 256, 128, 8, 4),)},
    "grad_a_dropout": {16: (_T(64, 1, 128, 16, 4, 4),), 64: (_T(32, 1, 256, 64, 4, 4),), 128: (_T(32, 1, 256, 128, 8, 4),)},
}  # fmt: skip
_SM_90 = {
    "gemm": {
        128: (_T(128, 256, 64, 64, 8, 3), _T(128, 128, 64, 64, 8, 3),
              _T(64, 128, 64, 64, 4, 4), _T(16, 64, 128, 64, 4, 4)),
    },
    "down": {
        16: (_T(64, 1, 128, 16, 4, 4), _T(16, 1, 256, 16, 2, 4)),
        64: (_T(128, 1, 64, 64, 4, 4), _T(16, 1, 128, 64, 4, 4)),
        128: (_T(128, 1, 64, 128, 4, 4), _T(16, 1, 64, 128, 8, 4)),
    },
    "down_dropout": {
        16: (_T(32, 1, 128, 16, 4, 4), _T(16, 1, 256, 16, 2, 4)),
        64: (_T(64, 1, 64, 64, 4, 4), _T(16, 1, 128, 64, 4, 4)),
        128: (_T(64, 1, 64, 128, 4, 4), _T(16, 1, 64, 128, 8, 4)),
    },
    "grad_s_b": {64: (_T(64, 128, 1, 64, 4, 3),), 128: (_T(64, 128, 1, 128, 8, 3),)},
    "grad_a": {16: (_T(32, 1, 256, 16, 4, 4),), 128: (_T(64, 1, 128, 128, 4, 4),)},
    "grad_a_dropout": {128: (_T(32, 1, 128, 128, 4, 4),)},
}  # fmt: skip
_SM_100 = _SM_90 | {
    "gemm": {128: (_T(256, 256, 64, 64, 8, 3), *_SM_90["gemm"][128])},
    "gemm_gain": _SM_90["gemm"],
    "gemm_dropout": _SM_90["gemm"],
    "down": _SM_90["down"] | {64: (_T(128, 1, 64, 64, 4, 4), _T(16, 1, 128, 64, 8, 4))},
    "down_dropout": {
        16: (_T(32, 1, 128, 16, 4, 4), _T(16, 1, 256, 16, 2, 4)),
        64: (_T(128, 1, 64, 64, 4, 4), _T(16, 1, 128, 64, 4, 4)),
        128: (_T(64, 1, 64, 128, 4, 4), _T(16, 1, 64, 128, 8, 4)),
    },
    "grad_s_b": {64: (_T(32, 256, 1, 64, 4, 3),), 128: (_T(32, 256, 1, 128, 8, 3),)},
    "grad_a": {64: (_T(32, 1, 256, 64, 4, 4),), 128: (_T(64, 1, 128, 128, 4, 4),)},
}
# sm_80's instructions with 99 KiB of shared memory: sm_86, sm_89, sm_120.
_SM_86 = _SM_80 | {
    "gemm": {128: _SM_80["gemm"][128][1:]},
    "gemm_gain": {128: _SM_80["gemm_gain"][128][1:]},
    "gemm_dropout": {128: _SM_80["gemm_dropout"][128]},
    "down": _SM_80["down"] | {128: (_T(64, 1, 64, 128, 4, 2), _T(16, 1, 64, 128, 4, 3))},
    "down_dropout": _SM_80["down_dropout"] | {128: (_T(64, 1, 64, 128, 8, 2), _T(16, 1, 64, 128, 4, 3))},
}
_GFX942 = {
    "gemm": {
        128: (_T(256, 128, 64, 128, 8, 2), _T(128, 128, 64, 128, 8, 2),
              _T(64, 128, 64, 128, 4, 2), _T(16, 64, 128, 128, 4, 2)),
    },
    "gemm_dropout": {
        128: (_T(256, 128, 64, 64, 8, 2), _T(128, 128, 64, 64, 8, 2),
              _T(64, 128, 64, 64, 4, 2), _T(16, 64, 128, 64, 4, 2)),
    },
    "down": {
        16: (_T(64, 1, 128, 16, 4, 2), _T(16, 1, 256, 16, 2, 2)),
        64: (_T(128, 1, 64, 64, 4, 2), _T(16, 1, 128, 64, 4, 2)),
        128: (_T(128, 1, 64, 128, 4, 2), _T(16, 1, 64, 128, 4, 2)),
    },
    "down_dropout": {
        16: (_T(64, 1, 64, 16, 4, 2), _T(16, 1, 128, 16, 2, 2)),
        64: (_T(128, 1, 64, 64, 4, 2), _T(16, 1, 128, 64, 4, 2)),
        128: (_T(128, 1, 64, 128, 4, 2), _T(16, 1, 64, 128, 4, 2)),
    },
    "grad_s_b": {16: (_T(64, 256, 1, 16, 4, 2),), 64: (_T(16, 256, 1, 64, 4, 2),), 128: (_T(32, 128, 1, 128, 4, 2),)},
    "grad_a": {128: (_T(32, 1, 256, 128, 4, 2),)},
    "grad_a_dropout": {64: (_T(32, 1, 256, 64, 4, 2),), 128: (_T(32, 1, 128, 128, 4, 2),)},
}  # fmt: skip
# A wave of 32 lanes holds the operands of its products twice, and 256 registers: small tiles, ranks in chunks.
_GFX1100 = {
    "gemm": {
        128: (_T(128, 128, 32, 16, 8, 2), _T(128, 64, 32, 16, 4, 2),
              _T(64, 64, 32, 16, 4, 2), _T(16, 64, 64, 64, 4, 2)),
    },
    "down": {
        16: (_T(64, 1, 64, 16, 4, 2), _T(16, 1, 64, 16, 1, 2)),
        128: (_T(64, 1, 32, 128, 4, 2), _T(16, 1, 64, 64, 4, 2)),
    },
    "down_dropout": {
        16: (_T(64, 1, 32, 16, 4, 2), _T(16, 1, 32, 16, 1, 2)),
        128: (_T(64, 1, 32, 64, 4, 2), _T(16, 1, 64, 64, 4, 2)),
    },
    "grad_s_b": {16: (_T(32, 64, 1, 16, 4, 2),), 128: (_T(32, 64, 1, 64, 8, 2),)},
    "grad_a": {16: (_T(32, 1, 256, 16, 4, 2),), 128: (_T(32, 1, 128, 128, 8, 2),)},
    "grad_a_dropout": {16: (_T(32, 1, 256, 16, 8, 2),), 128: (_T(32, 1, 128, 128, 8, 2),)},
}  # fmt: skip
_GENERIC = {
    "gemm": {32: (_T(64, 64, 32, 32, 4, 2), _T(16, 64, 32, 32, 4, 2))},
    "down": {64: (_T(32, 1, 64, 64, 4, 2), _T(16, 1, 64, 64, 4, 2))},
    "grad_s_b": {64: (_T(32, 64, 1, 64, 4, 2),)},
    "grad_a": {64: (_T(32, 1, 64, 64, 4, 2),)},
}
# float32 on every GPU. "ieee" runs on the FMA pipe, so the accumulator's registers bound the tile (128x128: 254 registers
# and half the programs); "tf32" would gain a quarter from 128x128 on sm_90, which the same row would take from "ieee".
_FLOAT32 = {
    "gemm": {32: (_T(128, 64, 32, 32, 8, 3), _T(64, 64, 32, 32, 4, 3), _T(16, 64, 64, 32, 4, 3))},
    "down": {32: (_T(64, 1, 64, 32, 4, 3), _T(16, 1, 64, 32, 2, 3))},
    "grad_s_b": {16: (_T(32, 64, 1, 16, 4, 3),)},
    "grad_a": {32: (_T(32, 1, 64, 32, 4, 3),)},
}
_FLOAT32_GFX1100 = {
    "gemm": {32: (_T(64, 64, 32, 16, 8, 2), _T(32, 64, 32, 16, 4, 2), _T(16, 64, 32, 16, 4, 2))},
    "down": {32: (_T(64, 1, 32, 16, 4, 2), _T(16, 1, 32, 16, 2, 2))},
    "grad_s_b": {32: (_T(32, 32, 1, 16, 4, 2),)},
    "grad_a": {32: (_T(32, 1, 64, 16, 4, 2),)},
}
_INTERPRETER = {
    "gemm": {32: (_T(32, 32, 64, 32, 4, 2),)},
    "down": {32: (_T(32, 1, 64, 32, 4, 2),)},
    "grad_s_b": {32: (_T(32, 32, 1, 32, 4, 2),)},
    "grad_a": {32: (_T(32, 1, 32, 32, 4, 2),)},
}
_TABLE = {
    "sm_80": _SM_80,
    "sm_86": _SM_86,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "gfx942": _GFX942,
    "gfx1100": _GFX1100,
    "generic": _GENERIC,
    "interpreter": _INTERPRETER,
}
_FAMILIES = {
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "gfx1101": "gfx1100",
    "gfx1102": "gfx1100",
    "gfx90a": "gfx942",
    "gfx950": "gfx942",
}


def family_of(arch: str) -> str:
    """The architecture whose rows `arch` takes: its own name, if it has rows or if no family is known."""
    return _FAMILIES.get(arch, arch)


def table_rows(op: str, arch: str, padded: int, dtype: torch.dtype) -> _Rows:
    """The rows that `choose` picks from. An operation without "_dropout" or "_gain" rows of its own uses the plain ones."""
    table = _TABLE.get(family_of(arch), _GENERIC)
    if dtype == torch.float32 and table not in (_GENERIC, _INTERPRETER):
        table = _FLOAT32_GFX1100 if table is _GFX1100 else _FLOAT32
    by_rank = table.get(op) or table[op.removesuffix("_dropout").removesuffix("_gain")]
    return by_rank[min((rank for rank in by_rank if rank >= padded), default=max(by_rank))]


@functools.lru_cache(maxsize=4096)
def choose(op: str, target: Target, *, M: int, N: int, R: int, dtype: torch.dtype) -> TileConfig:
    """The tile of operation `op` ("gemm", "down", "grad_s_b", "grad_a", one of these + "_dropout", "gemm_gain") on `target`.

    M and N are the rows and columns of the result that is tiled. Up to SKINNY_ROWS rows take the 16-row tile, if there is
    one; more take the largest tile that still gives every processor a program, or the smallest.
    """
    padded = padded_rank(R)
    rows = table_rows(op, target.arch, padded, dtype)
    skinny = rows[-1] if rows[-1].block_m == MIN_TILE_ROWS and len(rows) > 1 else None
    tall = rows[:-1] if skinny else rows
    if skinny and M <= SKINNY_ROWS:
        config = skinny
    else:
        filling = (c for c in tall if triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n) >= target.processors)
        config = next(filling, tall[-1])
    return dataclasses.replace(config, block_r=min(padded, config.block_r))


def padded_rank(r: int) -> int:
    """Columns of s and ds: the next power of two from R, at least 16; the columns past R are zeros."""
    return max(MIN_PADDED_RANK, triton.next_power_of_2(r))


def parts_along(length: int, block: int, other_programs: int, target: Target) -> tuple[int, int]:
    """Cut `length` into parts of whole blocks until parts * other_programs reaches PROGRAMS_PER_PROCESSOR everywhere.

    Returns the number of parts and the elements of each but the last, a multiple of `block`.
    """
    blocks = triton.cdiv(length, block)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * target.processors, other_programs)
    blocks_per_part = triton.cdiv(blocks, min(blocks, wanted))
    return triton.cdiv(blocks, blocks_per_part), blocks_per_part * block
