"""One GEMM with the low-rank product in its epilogue, over pointers: y and dx of the LoRA linear (lora.py).

    z = x w(n, k)^T + keep * (s b(n, r)^T)
    y = gain * z + bias

Shapes:  x [M, K], w(n, k) and b(n, r) by strides (dx takes w^T and a^T), s [M, RP], bias and gain [N] or None -> y [M, N];
         with gain (DoRA) z [M, N] as well, from the same sums
Reads:   x once per column of tiles, w once per row of tiles, s, b, bias and gain once per tile, after the loop
Dtypes:  x, w, s, y, z alike; b and bias in any float type; gain float32; sums in float32

The form over tensor descriptors is in lora_tma.py: the same tiles and sums, so the same bits.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile
from fastpeft.kernels.launch import dot_precision, launch, target_of
from fastpeft.kernels.tiling import TileConfig, padded_rank


@triton.jit
def grouped_tile(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of a program: GROUP_M row tiles go down before the next column tile.

    Programs that run together then share w's columns and x's rows in L2.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    return first_m + pid % tiles_in_group % group_m, pid % tiles_in_group // group_m


@triton.jit
def add_low_rank(
    acc,
    s_ptr,
    b_ptr,
    rows,
    offs_n,
    N,
    R,
    stride_bn,
    stride_br,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [rows, offs_n] + s b^T, in chunks of BLOCK_R ranks."""
    for first_rank in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
        offs_r = first_rank + tl.arange(0, BLOCK_R)
        mask = (offs_n[None, :] < N) & (offs_r[:, None] < R)
        s = tl.load(s_ptr + rows[:, None] * PADDED_R + offs_r[None, :])  # [BLOCK_M, BLOCK_R]
        b_offsets = offs_n[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
        b = tl.load(b_ptr + b_offsets, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s, b.to(s.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_outputs(
    acc,
    y_ptr,
    z_ptr,
    gain_ptr,
    bias_ptr,
    offs_m,
    offs_n,
    first_column,
    M,
    N,
    BLOCK_N: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """z = acc, if there is a gain; y = gain * acc + bias. Each is rounded once, from float32."""
    if HAS_GAIN:  # by halves: gain and bias of all columns beside the sums would not fit into the registers
        left, right = acc.reshape(acc.shape[0], 2, BLOCK_N // 2).permute(0, 2, 1).split()
        offs_left = first_column + tl.arange(0, BLOCK_N // 2)
        _store(left, y_ptr, z_ptr, gain_ptr, bias_ptr, offs_m, offs_left, M, N, True, HAS_BIAS)
        offs_right = offs_left + BLOCK_N // 2
        _store(right, y_ptr, z_ptr, gain_ptr, bias_ptr, offs_m, offs_right, M, N, True, HAS_BIAS)
    else:
        _store(acc, y_ptr, z_ptr, gain_ptr, bias_ptr, offs_m, offs_n, M, N, False, HAS_BIAS)


@triton.jit
def _store(acc, y_ptr, z_ptr, gain_ptr, bias_ptr, offs_m, offs_n, M, N, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr):
    mask_n = offs_n < N
    mask = (offs_m[:, None] < M) & mask_n[None, :]
    row_offsets = offs_m[:, None].to(tl.int64) * N
    if HAS_GAIN:
        tl.store(z_ptr + row_offsets + offs_n[None, :], acc.to(z_ptr.dtype.element_ty), mask=mask)
        acc *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row_offsets + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _lora_gemm_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    gain_ptr,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    seed: tl.int64,
    threshold,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),); EVEN_K: K % BLOCK_K == 0; EVEN_N: N % BLOCK_N == 0
    pid_m, pid_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    # Rows past M read row 0 and are not stored: no row mask in the loop.
    rows = tl.where(offs_m < M, offs_m, 0).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None] * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:  # the mask covers the low-rank part only, so that part comes first
        acc = add_low_rank(acc, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION)
        acc = tl.where(keep_tile(seed, offs_m, pid_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
    for k in range(0, K, BLOCK_K):
        # x tile [BLOCK_M, BLOCK_K], w tile [BLOCK_K, BLOCK_N]
        if EVEN_K:
            x = tl.load(x_ptrs)
            if EVEN_N:
                w = tl.load(w_ptrs)
            else:
                w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs, mask=(offs_k[:, None] < K - k) & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    if not DROPOUT:  # after the loop the tiles of s and b reuse its shared memory
        acc = add_low_rank(acc, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION)
    store_outputs(
        acc, y_ptr, z_ptr, gain_ptr, bias_ptr, offs_m, offs_n, pid_n * BLOCK_N, M, N, BLOCK_N, HAS_GAIN, HAS_BIAS
    )


def lora_gemm_pointers(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    config: TileConfig,
    *,
    seed: int,
    threshold: int,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and z (None without gain); x's last axis is contiguous, w [N, K] and b [N, R] may have any strides."""
    m, k = x.shape
    n, r = b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    z = None if gain is None else torch.empty_like(y)
    launch(
        _lora_gemm_kernel,
        (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),),
        config,
        x,
        w,
        s,
        b,
        bias,
        gain,
        y,
        z,
        m,
        n,
        k,
        r,
        x.stride(0),
        w.stride(0),
        w.stride(1),
        b.stride(0),
        b.stride(1),
        seed,
        threshold,
        PADDED_R=padded_rank(r),
        BLOCK_R=config.block_r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        EVEN_K=k % config.block_k == 0,
        EVEN_N=n % config.block_n == 0,
        HAS_BIAS=bias is not None,
        HAS_GAIN=gain is not None,
        DROPOUT=threshold > 0,
        PRECISION=dot_precision(precision, x.dtype, target_of(x.device)),
    )
    return y, z
