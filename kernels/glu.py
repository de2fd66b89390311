"""Gated linear units: one launch forward, one backward.

    h = act(gate) * up
    dgate = dh * up * act'(gate),   dup = dh * act(gate)

    silu       s = 1 / (1 + exp(-g)),                       act = g s,    act' = s + g s (1 - s)
    gelu       p = (1 + erf(g / sqrt(2))) / 2,              act = g p,    act' = p + g exp(-g^2 / 2) / sqrt(2 pi)
    gelu_tanh  s = 1 / (1 + exp(-2 c (g + 0.044715 g^3))),  act = g s,    act' = s + g s (1 - s) 2 c (1 + 3 * 0.044715 g^2)
               with c = sqrt(2 / pi); (1 + tanh(t)) / 2 is the sigmoid of 2 t, without its cancellation for negative t

Shapes:  gate, up, dh [M, N], any row strides with contiguous columns: the halves of a packed [M, 2N] as they are
         -> fresh contiguous h, dgate, dup, or the given outputs. An output may be the very memory of an input of the same
         strides (dgate that of dh): an element is read before it is written, by the one program that has it
Dtypes:  any of float32, float16, bfloat16; computed in float32, rounded once
Traffic: forward reads gate and up and writes h; backward reads dh, gate and up and writes dgate and dup, and h if asked
Source:  Shazeer 2020, arXiv:2002.05202
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch, rows_contiguous, target_of
from fastpeft.kernels.tiling import Target, TileConfig

# One pass over memory: two accesses of 16 bytes per lane and tensor, for 16 bits.
_TILE_ELEMENTS = 2048


@triton.jit
def _sigmoid(t):
    """(s, 1 - s), both without cancellation, by one exponential that cannot overflow."""
    e = tl.exp(-tl.abs(t))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(t >= 0, large, small), tl.where(t >= 0, small, large)


@triton.jit
def _act(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) of float32 g; what is not used is not computed."""
    if ACTIVATION == "gelu":
        p = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        return g * p, p + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    elif ACTIVATION == "gelu_tanh":
        square = g * g
        s, rest = _sigmoid(1.5957691216057308 * g * (1.0 + 0.044715 * square))
        return g * s, s + g * s * rest * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        s, rest = _sigmoid(g)
        return g * s, s + g * s * rest


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row numbers (int64) [BLOCK_M, 1], columns [1, BLOCK_N] and the mask of this program's tile."""
    offs_m = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    return offs_m, offs_n, (offs_m < M) & (offs_n < N)


@triton.jit(do_not_specialize=["M"])
def _glu_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    M,
    N,
    stride_gm,
    stride_um,
    stride_hm,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N))
    offs_m, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    g = tl.load(gate_ptr + offs_m * stride_gm + offs_n, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + offs_m * stride_um + offs_n, mask=mask, other=0.0).to(tl.float32)
    a, _ = _act(g, ACTIVATION)
    tl.store(h_ptr + offs_m * stride_hm + offs_n, (a * u).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _glu_grad_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    M,
    N,
    stride_dm,
    stride_gm,
    stride_um,
    stride_dgm,
    stride_dum,
    stride_hm,
    ACTIVATION: tl.constexpr,
    WITH_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N))
    offs_m, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    d = tl.load(dh_ptr + offs_m * stride_dm + offs_n, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + offs_m * stride_gm + offs_n, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + offs_m * stride_um + offs_n, mask=mask, other=0.0).to(tl.float32)
    a, slope = _act(g, ACTIVATION)
    tl.store(dgate_ptr + offs_m * stride_dgm + offs_n, (d * u * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + offs_m * stride_dum + offs_n, (d * a).to(dup_ptr.dtype.element_ty), mask=mask)
    if WITH_H:
        tl.store(h_ptr + offs_m * stride_hm + offs_n, (a * u).to(h_ptr.dtype.element_ty), mask=mask)


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """h [M, N] = act(gate) * up, in `out` if given; activation: "silu", "gelu" or "gelu_tanh"."""
    gate, up = rows_contiguous(gate), rows_contiguous(up)
    h = _fresh(gate) if out is None else out
    if gate.numel() == 0:
        return h
    m, n = gate.shape
    config = tile_of(n, target_of(gate.device))
    launch(
        _glu_kernel,
        (triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)),
        config,
        gate,
        up,
        h,
        m,
        n,
        gate.stride(0),
        up.stride(0),
        h.stride(0),
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    return h


def glu_grad(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    out_gate: torch.Tensor | None = None,
    out_up: torch.Tensor | None = None,
    with_h: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dgate, dup, h), h = act(gate) * up again or None; dgate and dup in the given outputs, or fresh."""
    dh, gate, up = rows_contiguous(dh), rows_contiguous(gate), rows_contiguous(up)
    dgate = _fresh(gate) if out_gate is None else out_gate
    dup = _fresh(up) if out_up is None else out_up
    h = _fresh(gate) if with_h else None
    if dh.numel() == 0:
        return dgate, dup, h
    m, n = dh.shape
    config = tile_of(n, target_of(dh.device))
    launch(
        _glu_grad_kernel,
        (triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)),
        config,
        dh,
        gate,
        up,
        dgate,
        dup,
        h,
        m,
        n,
        dh.stride(0),
        gate.stride(0),
        up.stride(0),
        dgate.stride(0),
        dup.stride(0),
        0 if h is None else h.stride(0),
        ACTIVATION=activation,
        WITH_H=with_h,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    return dgate, dup, h


def _fresh(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def tile_of(n: int, target: Target) -> TileConfig:
    """Whole rows, or parts of _TILE_ELEMENTS; few rows' ends are masked."""
    elements = 256 if target.arch == "interpreter" else _TILE_ELEMENTS
    block_n = min(elements, triton.next_power_of_2(n))
    num_warps = 2 if target.arch.startswith("gfx9") else 4  # 128 lanes
    return TileConfig(elements // block_n, block_n, block_k=1, block_r=1, num_warps=num_warps, num_stages=1)
