"""The second stage of every split sum: out(m, n) = sum over p of parts(p, m, n), added in the order of p.

A kernel that splits its contraction over programs writes float32 partial sums here instead of adding atomically: the
result does not depend on the order in which programs finish, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch
from fastpeft.kernels.tiling import TileConfig

# 512 elements for 2 warps: 16-byte loads on 32 and on 64 lanes, four parts in flight.
_ELEMENTS = 512


@triton.jit(do_not_specialize=["P", "M"])
def _sum_parts_kernel(
    parts_ptr,
    out_ptr,
    P,
    M,
    N,
    stride_pp,
    stride_pm,
    stride_om,
    stride_on,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N))
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    rows = offs_m[:, None].to(tl.int64)
    part_ptrs = parts_ptr + rows * stride_pm + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    step = stride_pp + tl.zeros((1, 1), tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, P, loop_unroll_factor=4):
        acc += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += step
    out_ptrs = out_ptr + rows * stride_om + offs_n[None, :].to(tl.int64) * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def sum_parts(parts: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of parts [P, M', N'] (float32, contiguous) over P, cut to out's M <= M', N <= N', into out [M, N].

    out is a tensor that the caller has just allocated, in any dtype and with any strides.
    """
    m, n = out.shape
    block_n = min(128, triton.next_power_of_2(n))
    config = TileConfig(_ELEMENTS // block_n, block_n, 1, 1, num_warps=2, num_stages=1)
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n))
    launch(
        _sum_parts_kernel,
        grid,
        config,
        parts,
        out,
        parts.shape[0],
        m,
        n,
        parts.stride(0),
        parts.stride(1),
        out.stride(0),
        out.stride(1),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
