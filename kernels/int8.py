"""8-bit rows written out as a dense weight: w^ = q * (row_absmax * (1 / 127)) in float32, rounded once.

Shapes:  q [N, K], contiguous; row_absmax [N]; w^ [N, K]; every N, K >= 1
Dtypes:  q int8, row_absmax float32; w^ float32, float16 or bfloat16
Moved:   q is read once, w^ is written once; row_absmax is read once per tile of its row

Source:  Dettmers et al. 2022, arXiv:2208.07339
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch
from fastpeft.kernels.tiling import TileConfig

STEP = tl.constexpr(1.0 / 127.0)

# 4 warps load two times 16 bytes per thread.
_ELEMENTS_PER_PROGRAM = 4096


@triton.jit
def _int8_dequantize_kernel(
    q_ptr,
    row_absmax_ptr,
    out_ptr,
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (cdiv(N, BLOCK_N), cdiv(K, BLOCK_K))
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_k[None, :] < K)
    offsets = offs_n[:, None].to(tl.int64) * K + offs_k[None, :]
    scale = tl.load(row_absmax_ptr + offs_n, mask=mask_n, other=0.0) * STEP
    q = tl.load(q_ptr + offsets, mask=mask, other=0)  # [BLOCK_N, BLOCK_K]
    w = q.to(tl.float32) * scale[:, None]
    tl.store(out_ptr + offsets, w.to(out_ptr.dtype.element_ty), mask=mask)


def int8_dequantize(
    q: torch.Tensor, row_absmax: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """w^ [N, K] in `dtype`: one read of q, one write; into `out` (contiguous, of `dtype`) if given."""
    n, k = q.shape
    out = torch.empty(n, k, dtype=dtype, device=q.device) if out is None else out
    block_k = min(2048, max(16, triton.next_power_of_2(k)))
    block_n = _ELEMENTS_PER_PROGRAM // block_k
    config = TileConfig(block_m=block_n, block_n=1, block_k=block_k, block_r=1, num_warps=4, num_stages=1)
    grid = (triton.cdiv(n, block_n), triton.cdiv(k, block_k))
    launch(_int8_dequantize_kernel, grid, config, q, row_absmax, out, n, k, BLOCK_N=block_n, BLOCK_K=block_k)
    return out
