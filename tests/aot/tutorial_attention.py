"""Plain causal attention in the manner of Triton's tutorial 06: what the attention kernels' compiled code is held against.

forward   one program per query tile; scores rescaled row by row, a stage of full tiles and one on the diagonal
backward  one program walks the queries below one key tile for dk and dv, then the keys beside one query tile for dq

Written for this comparison, from the tutorial's ideas over pointers: [B, H, S, D] contiguous, S a multiple of every tile, one key
head per query head, and the tutorial's tiles, warps and stages.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch
from fastpeft.kernels.tiling import TileConfig


@triton.jit
def _forward_tiles(
    acc, total, m, q, k_ptr, v_ptr, low, high, offs_m, scale, DIAGONAL: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):
    offs_d = tl.arange(0, D)
    for n in tl.range(low, high, N):
        offs_n = n + tl.arange(0, N)
        k = tl.load(k_ptr + offs_n[:, None] * D + offs_d[None, :])
        s = tl.dot(q, tl.trans(k))
        if DIAGONAL:
            s = s * scale + tl.where(offs_m[:, None] >= offs_n[None, :], 0.0, -1.0e6)
            m_new = tl.maximum(m, tl.max(s, 1))
            s -= m_new[:, None]
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            s = s * scale - m_new[:, None]
        p = tl.exp2(s)
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = tl.load(v_ptr + offs_n[:, None] * D + offs_d[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = m_new
    return acc, total, m


@triton.jit
def _tutorial_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, S, scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # grid (S / BLOCK_M, B * H)
    base = tl.program_id(1).to(tl.int64) * S * D
    first = tl.program_id(0) * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    place = base + offs_m[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + place)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32) + 1.0
    m = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    scale *= 1.44269504
    k_ptr += base
    v_ptr += base
    acc, total, m = _forward_tiles(acc, total, m, q, k_ptr, v_ptr, 0, first, offs_m, scale, False, BLOCK_N, D)
    acc, total, m = _forward_tiles(
        acc, total, m, q, k_ptr, v_ptr, first, first + BLOCK_M, offs_m, scale, True, BLOCK_N, D
    )
    tl.store(lse_ptr + tl.program_id(1) * S + offs_m, m + tl.log2(total))
    tl.store(o_ptr + place, (acc / total[:, None]).to(o_ptr.dtype.element_ty))


@triton.jit
def _dkdv_tiles(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    offs_n,
    low,
    steps,
    DIAGONAL: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
):
    offs_d = tl.arange(0, D)
    for step in tl.range(0, steps):
        offs_m = low + step * M + tl.arange(0, M)
        q = tl.load(q_ptr + offs_m[:, None] * D + offs_d[None, :])
        s = tl.dot(k, tl.trans(q))
        p = tl.exp2(s - tl.load(lse_ptr + offs_m)[None, :])
        if DIAGONAL:
            p = tl.where(offs_m[None, :] >= offs_n[:, None], p, 0.0)
        do = tl.load(do_ptr + offs_m[:, None] * D + offs_d[None, :])
        dv += tl.dot(p.to(do.dtype), do)
        dp = tl.dot(v, tl.trans(do)).to(tl.float32)
        ds = p * (dp - tl.load(delta_ptr + offs_m)[None, :])
        dk += tl.dot(ds.to(q.dtype), q)
    return dk, dv


@triton.jit
def _dq_tiles(
    dq, q, do, lse, delta, k_ptr, v_ptr, offs_m, low, steps, DIAGONAL: tl.constexpr, N: tl.constexpr, D: tl.constexpr
):
    offs_d = tl.arange(0, D)
    for step in tl.range(0, steps):
        offs_n = low + step * N + tl.arange(0, N)
        k = tl.load(k_ptr + offs_n[:, None] * D + offs_d[None, :])
        v = tl.load(v_ptr + offs_n[:, None] * D + offs_d[None, :])
        p = tl.exp2(tl.dot(q, tl.trans(k)) - lse[:, None])
        if DIAGONAL:
            p = tl.where(offs_m[:, None] >= offs_n[None, :], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v)).to(tl.float32) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k)
    return dq


@triton.jit
def _tutorial_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    S,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (S / BLOCK_N, B * H); keys are scaled beforehand; dk and dv walk BLOCK_M queries, dq BLOCK_M keys a step
    base = tl.program_id(1).to(tl.int64) * S * D
    offs_d = tl.arange(0, D)
    q_ptr += base
    k_ptr += base
    v_ptr += base
    do_ptr += base
    lse_ptr += tl.program_id(1).to(tl.int64) * S
    delta_ptr += tl.program_id(1).to(tl.int64) * S
    first = tl.program_id(0) * BLOCK_N
    offs = first + tl.arange(0, BLOCK_N)
    place = offs[:, None] * D + offs_d[None, :]
    k, v = tl.load(k_ptr + place), tl.load(v_ptr + place)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    near: tl.constexpr = BLOCK_M // 2  # the tutorial halves the steps on the diagonal
    dk, dv = _dkdv_tiles(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, offs, first, BLOCK_N // near, True, near, D)
    below = first + BLOCK_N
    dk, dv = _dkdv_tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, offs, below, (S - below) // BLOCK_M, False, BLOCK_M, D
    )
    tl.store(dv_ptr + base + place, dv.to(dv_ptr.dtype.element_ty))
    tl.store(dk_ptr + base + place, (dk * scale).to(dk_ptr.dtype.element_ty))
    q, do = tl.load(q_ptr + place), tl.load(do_ptr + place)
    lse, delta = tl.load(lse_ptr + offs), tl.load(delta_ptr + offs)
    dq = tl.zeros([BLOCK_N, D], tl.float32)
    dq = _dq_tiles(dq, q, do, lse, delta, k_ptr, v_ptr, offs, first, BLOCK_N // near, True, near, D)
    dq = _dq_tiles(dq, q, do, lse, delta, k_ptr, v_ptr, offs, 0, first // BLOCK_M, False, BLOCK_M, D)
    tl.store(dq_ptr + base + place, (dq * 0.6931471824645996).to(dq_ptr.dtype.element_ty))


def tutorial_attention(q: torch.Tensor, tiles: dict[str, TileConfig]) -> None:
    """Launch both kernels over q [B, H, S, D] as query, key and value: for a recording, results are not returned."""
    batch, heads, s, d = q.shape
    row = torch.empty(batch, heads, s, dtype=torch.float32, device=q.device)
    for kernel, tensors in (
        (_tutorial_fwd_kernel, (q, q, q, torch.empty_like(q), row)),
        (_tutorial_bwd_kernel, (q, q, q, q, row, row, *(torch.empty_like(q) for _ in range(3)))),
    ):
        tile = tiles["fwd" if kernel is _tutorial_fwd_kernel else "bwd"]
        grid = (triton.cdiv(s, max(tile.block_m, tile.block_n)), batch * heads)
        launch(kernel, grid, tile, *tensors, s, d**-0.5, D=d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n)
