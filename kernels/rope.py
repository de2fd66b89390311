"""Rotary position embedding of queries and keys in one launch.

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin        pairs (x1, x2) of a head's first R = 2 HALF columns; the rest is copied
    half-split:   x1 = x[0 : HALF], x2 = x[HALF : R]    (NeoX, Llama)
    interleaved:  x1 = x[0 : R : 2], x2 = x[1 : R : 2]  (GPT-J)

The gradient is the same rotation by the opposite angle: `sign` = -1 turns sin around, and no other kernel is needed.

Shapes:  q [B, S, H, D], k [B, S, H_kv, D], any strides with contiguous columns; cos, sin [P, HALF], or [B or 1, S, HALF];
         positions [B or 1, S] or none -> fresh contiguous q', k'
Row:     token (b, s) takes row positions[b, s] of a table [P, HALF], or row s + offset; its own row of [B or 1, S, HALF].
         A position outside the table gives NaN
Dtypes:  q, k alike, any of float32, float16, bfloat16, rounded once; cos, sin any of them; products in float32
Traffic: q and k are read once and written once, cos and sin once per HEADS heads, which share them in registers
Source:  Su et al. 2021, arXiv:2104.09864
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch, target_of
from fastpeft.kernels.tiling import PROGRAMS_PER_PROCESSOR, Target, TileConfig

# One pass over memory: 16 bytes per lane and access. With half the elements a lane loads 8 bytes of each half of a head.
_TILE_ELEMENTS = 2048


@triton.jit
def _rotate_head(
    x_ptrs,
    y_ptrs,
    rest_ptrs,
    rest_out_ptrs,
    cos,
    sin,
    mask_m,
    D,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One head of BLOCK_M tokens; x_ptrs [BLOCK_M, PADDED_HALF or twice that], rest_ptrs [BLOCK_M, PADDED_REST]."""
    if INTERLEAVED:
        mask = mask_m[:, None] & (tl.arange(0, 2 * PADDED_HALF) < 2 * HALF)[None, :]
        pairs = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32).reshape(BLOCK_M, PADDED_HALF, 2)
        x1, x2 = tl.split(pairs)
        y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin).reshape(BLOCK_M, 2 * PADDED_HALF)
        tl.store(y_ptrs, y.to(y_ptrs.dtype.element_ty), mask=mask)
    else:
        mask = mask_m[:, None] & (tl.arange(0, PADDED_HALF) < HALF)[None, :]
        x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (x1 * cos - x2 * sin).to(y_ptrs.dtype.element_ty), mask=mask)
        tl.store(y_ptrs + HALF, (x2 * cos + x1 * sin).to(y_ptrs.dtype.element_ty), mask=mask)
    if PADDED_REST > 0:
        mask = mask_m[:, None] & (2 * HALF + tl.arange(0, PADDED_REST) < D)[None, :]
        tl.store(rest_out_ptrs, tl.load(rest_ptrs, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["M", "S", "P", "offset"])
def _rotate_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    M,
    S,
    P,
    H,
    H_KV,
    D,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_cb,
    stride_cs,
    stride_pb,
    offset,
    sign,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M), cdiv(H + H_KV, HEADS)), M = B S
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_head = tl.program_id(1) * HEADS
    mask_m = offs_m < M
    tokens = tl.where(mask_m, offs_m, 0)
    batch, place = (tokens // S).to(tl.int64), (tokens % S).to(tl.int64)

    if HAS_POSITIONS:
        row = tl.load(positions_ptr + batch * stride_pb + place, mask=mask_m, other=0).to(tl.int64)
    else:
        row = place + offset
    offs_c = tl.arange(0, PADDED_HALF)
    mask_c = (mask_m & (row >= 0) & (row < P))[:, None] & (offs_c < HALF)[None, :]
    angles = batch[:, None] * stride_cb + row[:, None] * stride_cs + offs_c[None, :]
    cos = tl.load(cos_ptr + angles, mask=mask_c, other=float("nan")).to(tl.float32)  # [BLOCK_M, PADDED_HALF]
    sin = tl.load(sin_ptr + angles, mask=mask_c, other=float("nan")).to(tl.float32) * sign

    if INTERLEAVED:
        columns = tl.arange(0, 2 * PADDED_HALF)[None, :]
    else:
        columns = offs_c[None, :]
    q_rows = q_ptr + (batch * stride_qb + place * stride_qs)[:, None]
    k_rows = k_ptr + (batch * stride_kb + place * stride_ks)[:, None]
    q_out_rows = q_out_ptr + (tokens.to(tl.int64) * H * D)[:, None]
    k_out_rows = k_out_ptr + (tokens.to(tl.int64) * H_KV * D)[:, None]
    if PADDED_REST > 0:
        rest = 2 * HALF + tl.arange(0, PADDED_REST)[None, :]
    else:
        rest = columns
    for head in range(first_head, min(H, first_head + HEADS)):
        x, y = q_rows + tl.cast(head, tl.int64) * stride_qh, q_out_rows + head * D
        _rotate_head(
            x + columns, y + columns, x + rest, y + rest, cos, sin, mask_m, D, HALF, PADDED_HALF, PADDED_REST,
            INTERLEAVED, BLOCK_M
        )  # fmt: skip
    for head in range(max(H, first_head) - H, min(H + H_KV, first_head + HEADS) - H):
        x, y = k_rows + tl.cast(head, tl.int64) * stride_kh, k_out_rows + head * D
        _rotate_head(
            x + columns, y + columns, x + rest, y + rest, cos, sin, mask_m, D, HALF, PADDED_HALF, PADDED_REST,
            INTERLEAVED, BLOCK_M
        )  # fmt: skip


def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(q', k') as the module's docstring says; `inverse` rotates by the opposite angles, which is the gradient."""
    q, k = _columns_contiguous(q), None if k is None else _columns_contiguous(k)
    cos, sin = cos.contiguous(), sin.contiguous()
    b, s, h, d = q.shape
    h_kv = 0 if k is None else k.shape[2]
    half = cos.shape[-1]
    per_token = cos.dim() == 3
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = None if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if q.numel() == 0:
        return q_out, k_out
    positions = None if positions is None else positions.expand(b, s)
    if positions is not None and positions.stride(1) != 1 and s > 1:
        positions = positions.contiguous()
    padded_half = triton.next_power_of_2(half)
    target = target_of(q.device)
    config = _tile(padded_half, target)
    heads = _heads_per_program(b * s, h + h_kv, config.block_m, target)
    keys = q if k is None else k
    launch(
        _rotate_kernel,
        (triton.cdiv(b * s, config.block_m), triton.cdiv(h + h_kv, heads)),
        config,
        q,
        keys,
        q_out,
        q_out if k_out is None else k_out,
        cos,
        sin,
        positions,
        b * s,
        s,
        cos.shape[-2],
        h,
        h_kv,
        d,
        *q.stride()[:3],
        *keys.stride()[:3],
        cos.stride(0) if per_token and cos.shape[0] > 1 else 0,
        cos.stride(-2),
        0 if positions is None else positions.stride(0),
        offset,
        -1.0 if inverse else 1.0,
        HALF=half,
        PADDED_HALF=padded_half,
        PADDED_REST=triton.next_power_of_2(d - 2 * half) if d > 2 * half else 0,
        INTERLEAVED=interleaved,
        HAS_POSITIONS=positions is not None,
        HEADS=heads,
        BLOCK_M=config.block_m,
    )
    return q_out, k_out


def _columns_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _tile(padded_half: int, target: Target) -> TileConfig:
    block_m = max(1, min(64, _TILE_ELEMENTS // (2 * padded_half)))
    num_warps = 2 if target.arch.startswith("gfx9") else 4  # 128 lanes
    return TileConfig(block_m=block_m, block_n=1, block_k=1, block_r=1, num_warps=num_warps, num_stages=1)


def _heads_per_program(tokens: int, heads: int, block_m: int, target: Target) -> int:
    """A power of two: all heads share one read of cos and sin, unless that leaves processors without a program."""
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * target.processors, triton.cdiv(tokens, block_m))
    groups = min(heads, wanted)
    return triton.next_power_of_2(triton.cdiv(heads, groups))
