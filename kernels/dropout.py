"""Dropout masks that are computed, never stored: Philox bits of (seed, row, column).

    keep(m, k) = bits(seed, m, k) >= threshold,    P(keep) = 1 - threshold / 65536

One Philox-4x32 call with key `seed` and counter (row, column // 8, 0, 0) makes four 32-bit words, 16 bits for each of 8
neighbouring columns. Column k takes word (k % 8) // 2, the low half if k is even, the high half if it is odd. Nothing
else enters, so every kernel and every tiling draws the same mask, and no index can overflow: row and column group are
separate counter words, and all 64 bits of the seed are the key.

Source:  Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch
from fastpeft.kernels.tiling import TileConfig

# Seven rounds are the fewest that pass BigCrush (Salmon et al., table 2). With 16 bits per element the S kernel takes 12
# instructions per element; ten rounds of 32 bits take 25, and one tl.rand per element 58: slower than reading x.
PHILOX_ROUNDS = tl.constexpr(7)
COLUMNS_PER_CALL = tl.constexpr(8)

LEVELS = 65536  # values of an element's 16 bits
_KEEP_TILE = TileConfig(block_m=32, block_n=1, block_k=256, block_r=1, num_warps=4, num_stages=1)


@triton.jit
def keep_tile(seed, offs_m, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] booleans for rows offs_m and columns first_column + [0, COLUMNS); both multiples of 8."""
    group = first_column // COLUMNS_PER_CALL + tl.arange(0, COLUMNS // COLUMNS_PER_CALL)
    # [ROWS, COLUMNS // 8] each
    word_0, word_1, word_2, word_3 = tl.philox(seed, offs_m[:, None], group[None, :], 0, 0, n_rounds=PHILOX_ROUNDS)
    # [ROWS, COLUMNS // 8, 2, 2]: the last two axes are the two bits of the word's number
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)).to(tl.uint32, bitcast=True)
    return tl.join(words & 0xFFFF, words >> 16).reshape(ROWS, COLUMNS) >= threshold


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _lora_keep_kernel(
    keep_ptr, M, K, seed: tl.int64, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # grid (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K))
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_K
    offs_k = first_column + tl.arange(0, BLOCK_K)
    keep = keep_tile(seed, offs_m, first_column, threshold, BLOCK_M, BLOCK_K)
    mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    tl.store(keep_ptr + offs_m[:, None].to(tl.int64) * K + offs_k[None, :], keep.to(tl.int8), mask=mask)


def lora_keep(seed: int, M: int, K: int, threshold: int, device: torch.device | str) -> torch.Tensor:
    """The mask [M, K] that the LoRA kernels draw from `seed`: True where an element of x is kept. For tests and oracles."""
    keep = torch.empty(M, K, dtype=torch.int8, device=device)
    grid = (triton.cdiv(M, _KEEP_TILE.block_m), triton.cdiv(K, _KEEP_TILE.block_k))
    launch(
        _lora_keep_kernel,
        grid,
        _KEEP_TILE,
        keep,
        M,
        K,
        seed,
        threshold,
        BLOCK_M=_KEEP_TILE.block_m,
        BLOCK_K=_KEEP_TILE.block_k,
    )
    return keep.view(torch.bool)


def kept_scale(scale: float, threshold: int) -> float:
    """c = scale / (1 - p), p = threshold / 65536: what the kept part of x is multiplied by."""
    return scale / (1.0 - threshold / LEVELS)
