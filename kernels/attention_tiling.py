"""Tiles of the attention kernels: a pure function of (kernel, target, head dim, dtype, terms). See tiling.py.

block_m counts queries and block_n keys in every kernel; block_k is the padded head dim. Chosen with Triton 3.8.0 from static
metrics: no spill in a main loop, then the tensor pipe's share of one turn of it. What each step gave, causal, 4099 tokens,
4 query heads on a key head (spills / of these in the main loop, I/T: issue slots per tensor cycle):

    step                                                    sm_80 dk/dv 128    sm_90 dk/dv 128        gfx942 dk/dv 64
    one loop for each range of masked tiles                 15/2   I/T 0.44    64x128: 82/17 I/T 0.42     20/0  p 0.75
    one loop for all masked tiles                           13/2   0.42        40/11  0.41                 0/0  p 0.76
    addresses that advance instead of products in 64 bits   13/2   0.38        36/12  0.39                 0/0  p 0.74
    rows past the end repeat the last one, without a mask    0/0   0.36         0/0   0.35                 0/0  p 0.73

The last step also ends the spills of the forward (sm_80: 12 and 19, sm_90 with a bias: 33). do beside q saves spills on sm_80
where rows are even (8/2 -> 0/0), but beside a bias gfx942 has no registers for it (p 0.82 -> 0.64). dq with a bias on sm_80 at
D = 128: 53/19 with v beside k, 14/0 with v after the weights. Tried and left: sm_80 dk/dv at D = 128 in 64x64 with 4 warps (p
0.92, 28/14), 64x32 (p 0.74, 0/0, four times the reads); one stage for masked tiles (58/0); sm_90 dk/dv at D = 64 in 128x128
(64/30). gfx942's forward at D = 64 with a bias waits for its vector pipe: p 0.547, in other tiles 0.49 to 0.54. dk/dv at
D = 256 does not fit well: sm_90 944/277 in 32x64, 46/18 with 8 warps, 8/0 in 16x64. Exact float32 dq on sm_80 spills at
D = 128 in every tile: 4477 in the loop in 32x32, 102 in 32x16 with 8 warps. gfx1100: dk/dv at D = 128 20 in its loop.
"""

import torch
import triton

from fastpeft.kernels.attention_call import AttentionCall
from fastpeft.kernels.tiling import Target, TileConfig, family_of

MIN_BLOCK_D = 16

# (queries, keys, warps, stages, rows of a matrix instruction on AMD) by kernel and padded head dim, for float16 and bfloat16.
# A bias takes its rows from "KERNEL_bias" where there are some. Query tiles of dk and dv divide those of the other kernels.
_Tile = tuple[int, ...]
_Table = dict[tuple[str, int], _Tile]
_SM_80: _Table = {
    ("fwd", 64): (128, 64, 4, 2),
    ("dq", 64): (128, 32, 4, 2),
    ("dkdv", 64): (32, 128, 4, 2),
    ("dkdv_bias", 64): (32, 128, 8, 2),
    ("fwd", 128): (128, 64, 8, 2),
    ("fwd_bias", 128): (64, 64, 4, 2),
    ("dq", 128): (64, 64, 4, 2),
    ("dkdv", 128): (32, 128, 8, 2),
    ("dkdv_bias", 128): (32, 64, 4, 2),
    ("fwd", 256): (64, 32, 4, 2),
    ("dq", 256): (32, 32, 4, 2),
    ("dkdv", 256): (32, 32, 4, 2),
}
_SM_90: _Table = {
    ("fwd", 64): (128, 128, 8, 3),
    ("dq", 64): (128, 128, 8, 2),
    ("dkdv", 64): (64, 128, 8, 2),
    ("fwd", 128): (128, 128, 8, 2),
    ("dq", 128): (128, 64, 8, 2),
    ("dkdv", 128): (64, 128, 8, 2),
    ("fwd", 256): (128, 64, 8, 2),
    ("dq", 256): (64, 32, 4, 2),
    ("dkdv", 256): (16, 64, 8, 2),
}
_SM_100: _Table = _SM_90 | {
    ("dkdv", 64): (128, 128, 8, 2),
    ("dkdv_bias", 64): (64, 128, 8, 2),
    ("dkdv", 256): (32, 64, 4, 2),
}
_SM_120: _Table = _SM_80 | {("dkdv", 64): (32, 128, 8, 2), ("dkdv", 128): (32, 64, 4, 2)}
_GFX942: _Table = {
    ("fwd", 64): (128, 64, 4, 2),
    ("dq", 64): (128, 32, 4, 2),
    ("dkdv", 64): (32, 128, 4, 2, 16),
    ("fwd", 128): (128, 64, 4, 2),
    ("dq", 128): (128, 32, 4, 2),
    ("dkdv", 128): (32, 64, 4, 2, 16),
    ("fwd", 256): (64, 32, 4, 1, 16),
    ("dq", 256): (64, 32, 4, 1, 16),
    ("dkdv", 256): (16, 64, 4, 1, 16),
}
# GPUs without rows of their own: one stage where two would pass 64 KiB of shared memory.
_SMALL: _Table = {
    (kernel, d): (32, 32, 4, 2 if d == 64 else 1) for kernel in ("fwd", "dq", "dkdv") for d in (64, 128, 256)
}
# Where q and k are rotated when they are loaded, instead of the rows above: each tile comes with its partners and two of angles.
_ROTATED: dict[str, _Table] = {
    "sm_80": {("dq", 128): (128, 32, 8, 2)},
    "sm_90": {("fwd", 128): (128, 64, 8, 2)},
    "sm_100": {("fwd", 128): (128, 64, 8, 2)},
}
_GFX1100: _Table = _SMALL | {
    ("dkdv", 64): (16, 64, 4, 1),
    ("dq", 128): (32, 16, 4, 1),
    ("dkdv", 128): (16, 32, 4, 1),
}
_TABLE = {
    "sm_80": _SM_80,
    "sm_86": _SM_80,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "sm_120": _SM_120,
    "gfx942": _GFX942,
    "gfx1100": _GFX1100,
}
# float32, exact: NVIDIA's products then run on the plain pipes.
_FLOAT32: _Table = _SMALL | {
    ("fwd", 128): (32, 32, 8, 1),
    ("dq", 128): (32, 16, 8, 1),
    ("dkdv", 128): (16, 32, 4, 1),
    ("fwd", 256): (32, 32, 8, 1),
    ("dq", 256): (16, 16, 8, 1),
    ("dkdv", 256): (16, 32, 8, 1),
}
_FLOAT32_GFX942: _Table = _SMALL | {
    ("fwd", 128): (64, 32, 4, 1, 16),
    ("dq", 128): (64, 32, 4, 1, 16),
    ("dkdv", 128): (32, 64, 4, 1, 16),
}


def padded_head_dim(d: int) -> int:
    """Columns of a tile of q, k and v: the next power of two from D, at least 16."""
    return max(MIN_BLOCK_D, triton.next_power_of_2(d))


def choose_attention(kernel: str, target: Target, *, D: int, dtype: torch.dtype, call: AttentionCall) -> TileConfig:
    """The tile of `kernel` ("fwd", "dq", "dkdv", "dbias") on `target` for head dim D and the terms of `call`."""
    block_d = padded_head_dim(D)
    if target.arch == "interpreter":
        return TileConfig(16 if kernel == "dkdv" else 32, 32, block_d, 1, 4, 2)
    if dtype == torch.float32:
        table = _FLOAT32_GFX942 if family_of(target.arch) == "gfx942" else _FLOAT32
    else:
        table = _TABLE.get(target.arch) or _TABLE.get(family_of(target.arch), _SMALL)
    row, columns = "dq" if kernel == "dbias" else kernel, max(64, block_d)
    plain = table[row, columns]
    m, n, warps, stages, *side = plain if call.bias is None else table.get((f"{row}_bias", columns), plain)
    if call.cos is not None:
        wide = _SMALL[row, columns] if columns > 128 else (m, n, warps, stages, *side)
        m, n, warps, stages, *side = _ROTATED.get(family_of(target.arch), {}).get((row, columns), wide)
    if kernel in ("dq", "dbias") and call.distances is not None:
        m = min(m, n)  # a tile's diagonals are told apart by blocks of its keys
    if kernel == "fwd" and call.distances is not None and call.bias is not None:
        n = min(n, 64)  # two stages of both terms beside 128 keys pass an H100's shared memory
    return TileConfig(m, n, block_d, 1, warps, stages, matrix_side=side[0] if side else 0)
