"""Tile shapes of the in-loop 4-bit GEMM (nf4_gemm.py): a pure function over a literal table, as tiling.py is for the others.

Two operations: "gemm", y = x w^T, where w is packed along the contraction (block_k), and "grad", dx = dy w, where it is
packed along the result's columns (block_n). A tile's packed side divides the packed row, so that no tile of w is masked.
"""

import dataclasses
import functools

import torch
import triton

from fastpeft.kernels.tiling import Target, TileConfig, padded_rank

_T = TileConfig

# {family: {operation: rows}}, for float16 and bfloat16, from the largest tile to the smallest; the three smallest have 64,
# 32 and 16 rows of x. Chosen with Triton 3.8.0 and its ptxas from static metrics, N = K = 4096, blocks of 64: no row spills
# a register. Per turn of the main loop, plain / double quantisation, "gemm" and, behind the semicolon, "grad":
#                                 sm_80                       sm_90                       sm_100
# 16 rows, instructions / weight  6.0 / 6.6; 6.1 / 6.6        6.0 / 6.5; 6.1 / 6.7        5.9 / 6.6; 6.1 / 6.7
# 16 rows, KiB in flight per SM   48 / 48; 48 / 48            48 / 64; 48 / 48            48 / 48; 48 / 48
# 32 rows, instructions / weight  - / 7.0; - / 7.0            - / 6.9; - / 6.9            - / 6.9; - / 6.9
# large, tensor cycles / busiest  1.00 / 0.98; 1.00 / 0.98    1.00 / 1.00; 1.00 / 1.00    0.98 / 0.90; 0.97 / 0.90
# large: instructions are issued in 448 of the tensor cores' 1024 cycles on sm_80, 494 of 1024 on sm_90, 522 of 512 on sm_100
# Measured and rejected, M x N x K:
# the decoded tile as the left operand (result transposed): 256x128x64 on sm_90 reads shared memory for 808 cycles instead of
#   488, 128x128x64 has share 0.63 instead of 1.00; 16 rows on sm_90 take 6.8 instructions per weight instead of 6.0
# nibbles taken from bytes instead of words: 7.1 to 8.1 instructions per weight; a gather for each nibble: 7.0 to 8.1
# 16x128x128, 4 warps: 5.5 instructions per weight and 48 KiB, but 254 registers on sm_80 and two programs per SM
# 16x128x128, 8 warps: 24 KiB in flight (151 registers, one program); 256 along K: one program, or spills
# 128x128x64 on sm_80: share 0.84 (shared memory); 256x128x32: 1.00 with 255 registers, 0.97 with double quantisation
_HALVES = {
    "sm_80": {
        "gemm": (_T(256, 64, 64, 32, 8, 3), _T(128, 64, 64, 32, 4, 3), _T(64, 64, 64, 64, 4, 4),
                 _T(32, 64, 128, 64, 4, 4), _T(16, 64, 128, 64, 4, 5)),
        "grad": (_T(256, 64, 64, 32, 8, 3), _T(128, 64, 64, 32, 4, 3), _T(64, 64, 64, 64, 4, 4),
                 _T(32, 128, 64, 64, 4, 4), _T(16, 128, 64, 64, 4, 5)),
    },
    "sm_86": {
        "gemm": (_T(256, 64, 64, 32, 8, 3), _T(128, 64, 64, 32, 4, 3), _T(64, 64, 64, 64, 4, 3),
                 _T(32, 64, 128, 64, 4, 3), _T(16, 64, 128, 64, 4, 3)),
        "grad": (_T(256, 64, 64, 32, 8, 3), _T(128, 64, 64, 32, 4, 3), _T(64, 64, 64, 64, 4, 3),
                 _T(32, 128, 64, 64, 4, 3), _T(16, 128, 64, 64, 4, 3)),
    },
    "sm_90": {
        "gemm": (_T(256, 128, 64, 32, 8, 3), _T(128, 128, 64, 32, 8, 3), _T(64, 64, 128, 64, 4, 4),
                 _T(32, 64, 128, 64, 4, 4), _T(16, 64, 128, 64, 4, 5)),
        "grad": (_T(256, 128, 64, 32, 8, 3), _T(128, 128, 64, 32, 8, 3), _T(64, 128, 64, 64, 4, 4),
                 _T(32, 128, 64, 64, 4, 4), _T(16, 128, 64, 64, 4, 5)),
    },
    "gfx942": {
        "gemm": (_T(256, 128, 64, 32, 8, 2), _T(128, 128, 64, 32, 8, 2), _T(64, 64, 128, 64, 4, 2),
                 _T(32, 128, 64, 64, 4, 2), _T(16, 64, 128, 64, 4, 2)),
        "grad": (_T(256, 128, 64, 32, 8, 2), _T(128, 128, 64, 32, 8, 2), _T(64, 128, 64, 64, 4, 2),
                 _T(32, 128, 64, 64, 4, 2), _T(16, 128, 64, 64, 4, 2)),
    },
    "generic": {
        "gemm": (_T(64, 64, 32, 32, 4, 2), _T(32, 64, 64, 32, 4, 2), _T(16, 64, 64, 32, 4, 2)),
        "grad": (_T(64, 64, 32, 32, 4, 2), _T(32, 64, 64, 32, 4, 2), _T(16, 64, 64, 32, 4, 2)),
    },
    "interpreter": {
        "gemm": (_T(64, 32, 64, 32, 4, 2), _T(32, 32, 128, 32, 4, 2), _T(16, 32, 128, 32, 4, 2)),
        "grad": (_T(64, 64, 32, 32, 4, 2), _T(32, 256, 32, 32, 4, 2), _T(16, 256, 32, 32, 4, 2)),
    },
}  # fmt: skip
# float32 on every GPU: "ieee" runs on the FMA pipe, so a decode is cheap beside the products of any tile. With 4 warps
# 64x64x32 spills 283 times.
_FLOAT32 = (_T(64, 64, 32, 32, 8, 3), _T(32, 64, 32, 32, 4, 3), _T(16, 64, 32, 32, 4, 3))
_FAMILIES = {
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_100": "sm_90",
    "sm_103": "sm_90",
    "sm_110": "sm_90",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "gfx90a": "gfx942",
    "gfx950": "gfx942",
}

SKINNY_ROWS = 64  # up to here the GEMM waits for w, not for the tensor cores: its contraction is split over programs
PROGRAMS_PER_PROCESSOR = 3  # of the 16-row tiles, three fit on an SM
SUM_TILE = _T(16, 64, 1, 64, 4, 1)  # the second kernel of a split sum


@functools.lru_cache(maxsize=4096)
def choose_nf4(op: str, target: Target, *, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> TileConfig:
    """The tile of `op` ("gemm" or "grad") on `target` for a result [M, N] and a contraction over K.

    Up to SKINNY_ROWS rows take the smallest tile that covers them; more take the largest that still gives every processor a
    program, or the smallest of 64 rows or more. The packed side is halved until it divides the packed row.
    """
    family = _FAMILIES.get(target.arch, target.arch)
    table = _HALVES.get(family, _HALVES["generic"])
    rows = _FLOAT32 if dtype == torch.float32 and family != "interpreter" else table[op]
    if M <= SKINNY_ROWS:
        config = next((c for c in reversed(rows) if c.block_m >= M), rows[0])
    else:
        tall = [c for c in rows if c.block_m >= SKINNY_ROWS] or rows[:1]
        filling = (c for c in tall if triton.cdiv(M, c.block_m) * triton.cdiv(N, c.block_n) >= target.processors)
        config = next(filling, tall[-1])
    packed_row, side = (K, "block_k") if op == "gemm" else (N, "block_n")
    block = getattr(config, side)
    while packed_row % block:
        block //= 2
    return dataclasses.replace(config, block_r=min(padded_rank(R), config.block_r), **{side: block})


def split_contraction(M: int, K: int, config: TileConfig, tiles: int, target: Target) -> int:
    """Parts that the contraction is cut into: 1 for more than SKINNY_ROWS rows, else until every processor has its programs."""
    if M > SKINNY_ROWS:
        return 1
    steps = triton.cdiv(K, config.block_k)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * target.processors, tiles)
    return triton.cdiv(steps, triton.cdiv(steps, min(steps, wanted)))
