"""Tiles of the attention kernels: a pure function of (kernel, target, head dim, dtype, terms). See tiling.py.

block_m counts queries and block_n keys in every kernel; block_k is the padded head dim. Chosen with Triton 3.8.0 from static
metrics: no spill in a main loop, then the tensor pipe's share of one turn of it.
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
    ("dkdv", 256): (32, 64, 4, 2),
}
_SM_100: _Table = _SM_90 | {("fwd_bias", 128): (128, 64, 8, 2)}
_GFX942: _Table = {
    ("fwd", 64): (128, 64, 4, 2),
    ("dq", 64): (128, 32, 4, 2),
    ("dkdv", 64): (32, 128, 4, 2, 16),
    ("fwd", 128): (128, 64, 4, 2),
    ("dq", 128): (128, 32, 4, 2),
    ("dkdv", 128): (32, 64, 4, 2, 16),
    ("fwd", 256): (64, 32, 4, 1),
    ("dq", 256): (64, 32, 4, 1),
    ("dkdv", 256): (32, 32, 4, 1),
}
# float32 everywhere, and GPUs without rows of their own: one stage where two would pass 64 KiB of shared memory.
_SMALL: _Table = {
    (kernel, d): (32, 32, 4, 2 if d == 64 else 1) for kernel in ("fwd", "dq", "dkdv") for d in (64, 128, 256)
}
_TABLE = {"sm_80": _SM_80, "sm_86": _SM_80, "sm_90": _SM_90, "sm_100": _SM_100, "gfx942": _GFX942}


def padded_head_dim(d: int) -> int:
    """Columns of a tile of q, k and v: the next power of two from D, at least 16."""
    return max(MIN_BLOCK_D, triton.next_power_of_2(d))


def choose_attention(kernel: str, target: Target, *, D: int, dtype: torch.dtype, call: AttentionCall) -> TileConfig:
    """The tile of `kernel` ("fwd", "dq", "dkdv", "dbias") on `target` for head dim D and the terms of `call`."""
    block_d = padded_head_dim(D)
    if target.arch == "interpreter":
        return TileConfig(16 if kernel == "dkdv" else 32, 32, block_d, 1, 4, 2)
    table = _SMALL if dtype == torch.float32 else _TABLE.get(family_of(target.arch), _SMALL)
    row, columns = "dq" if kernel == "dbias" else kernel, max(64, block_d)
    plain = table[row, columns]
    m, n, warps, stages, *side = plain if call.bias is None else table.get((f"{row}_bias", columns), plain)
    if kernel in ("dq", "dbias") and call.distances is not None:
        m = min(m, n)  # a tile's diagonals are told apart by blocks of its keys
    if kernel == "fwd" and call.distances is not None and call.bias is not None:
        n = min(n, 64)  # two stages of both terms beside 128 keys pass an H100's shared memory
    return TileConfig(m, n, block_d, 1, warps, stages, matrix_side=side[0] if side else 0)
