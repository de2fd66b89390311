"""The LoRA linear over a dense base: S = x a^T, then one GEMM whose epilogue adds S b^T, and the same GEMM for dx.

    c  = scale / (1 - threshold / 65536)
    s  = c * (keep * x) a^T                    lora_down      reads x once
    y  = x w^T + s b^T + bias                  lora_epilogue  reads s, b, bias once per tile of y, after the K loop
    ds = c * dy b,   db = dy^T s               lora_grad_s_b  reads dy once            (lora_grad.py)
    dx = dy w + keep * (ds a)                  lora_grad_x    the same GEMM, strides of w and b exchanged
    da = ds^T (keep * x)                       lora_grad_a    reads x once             (lora_grad.py)

Shapes:  x [M, K], w [N, K], a [R, K], b [N, R], bias [N] or None, dy [M, N]; s and ds [M, RP], RP = padded_rank(R), with
         zeros past column R. Every M, N, K, R >= 1. y, dx, s, ds, da, db come back freshly allocated and contiguous
Strides: any for w, a, b. x and dy may have any row stride; if their last axis is not contiguous they are copied, once.
         Rows of x, w and dy that do not start on 16 bytes are correct, and several times slower
Dtypes:  x, w, s, dy alike: float32, float16, bfloat16. a, b, bias in any of these: cast to x's dtype on load. Sums in
         float32; c multiplies s and ds in float32 before their only rounding, so that a and b are never scaled
Dropout: keep is drawn again in each kernel from `seed` (dropout.py); threshold 0 keeps all and costs nothing
Sums:    no atomics: equal inputs give equal bits

`precision` is "ieee" or "tf32", for float32 products; it has no effect on float16 and bfloat16.
Source:  Hu et al. 2021, arXiv:2106.09685, section 4.1
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile, kept_scale, lora_keep
from fastpeft.kernels.launch import dot_precision, launch, rows_contiguous, target_of
from fastpeft.kernels.lora_grad import lora_grad_a, lora_grad_s_b
from fastpeft.kernels.partial_sums import sum_parts
from fastpeft.kernels.tiling import choose, padded_rank, parts_along

__all__ = [
    "lora_down",
    "lora_epilogue",
    "lora_grad_a",
    "lora_grad_s_b",
    "lora_grad_x",
    "lora_keep",
    "padded_rank",
]


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _lora_down_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_ar,
    stride_ak,
    scale,
    seed: tl.int64,
    threshold,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M), parts of K, PADDED_R // BLOCK_R); s [parts, M, PADDED_R]; EVEN_K: K % BLOCK_K == 0
    pid_k = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_r = offs_r[:, None] < R
    rows = tl.where(offs_m < M, offs_m, 0).to(tl.int64)  # rows past M read row 0 and are not stored
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    a_ptrs = a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + offs_k[None, :] * stride_ak

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    all_steps = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(all_steps, tl.num_programs(1))
    for step in range(pid_k * steps, min((pid_k + 1) * steps, all_steps)):
        k = step * BLOCK_K
        # x tile [BLOCK_M, BLOCK_K], a tile [BLOCK_R, BLOCK_K]
        a_offset = tl.cast(k, tl.int64) * stride_ak
        if EVEN_K:
            x = tl.load(x_ptrs + k)
            a = tl.load(a_ptrs + a_offset, mask=mask_r, other=0.0)
        else:
            mask_k = offs_k[None, :] < K - k
            x = tl.load(x_ptrs + k, mask=mask_k, other=0.0)
            a = tl.load(a_ptrs + a_offset, mask=mask_r & mask_k, other=0.0)
        if DROPOUT:
            x = tl.where(keep_tile(seed, offs_m, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = tl.dot(x, a.to(x.dtype).T, acc, input_precision=PRECISION)

    s_rows = pid_k.to(tl.int64) * M + offs_m[:, None]
    s_ptrs = s_ptr + s_rows * PADDED_R + offs_r[None, :]
    tl.store(s_ptrs, (acc * scale).to(s_ptr.dtype.element_ty), mask=offs_m[:, None] < M)


@triton.jit
def _add_low_rank(
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


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _lora_gemm_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),); y [M, N] = x [M, K] w(n, k)^T + keep * (s [M, PADDED_R] b(n, r)^T) + bias
    # GROUP_M row tiles go down before the next column tile: programs that run together share w's columns and x's rows in L2.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // tiles_in_group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % tiles_in_group % group_m
    pid_n = pid % tiles_in_group // group_m

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    rows = tl.where(offs_m < M, offs_m, 0).to(
        tl.int64
    )  # rows past M read row 0 and are not stored: no row mask in the loop
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None] * stride_wk

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:  # the mask covers the low-rank part only, so that part comes first
        acc = _add_low_rank(acc, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION)
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
        acc = _add_low_rank(acc, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & mask_n[None, :])


def lora_down(
    x: torch.Tensor, a: torch.Tensor, *, scale: float, seed: int, threshold: int, precision: str
) -> torch.Tensor:
    """s [M, RP] = c * (keep * x) a^T in x's dtype: one read of x, split over K where the rows alone would not fill the GPU."""
    x = rows_contiguous(x)
    m, k = x.shape
    r, padded_r = a.shape[0], padded_rank(a.shape[0])
    target = target_of(x.device)
    config = choose("down_dropout" if threshold else "down", target, M=m, N=r, R=r, dtype=x.dtype)
    tiles_m, tiles_r = triton.cdiv(m, config.block_m), triton.cdiv(padded_r, config.block_r)
    parts, _ = parts_along(k, config.block_k, tiles_m * tiles_r, target)
    s = torch.empty(m, padded_r, dtype=x.dtype, device=x.device)
    partial = s[None] if parts == 1 else torch.empty(parts, m, padded_r, dtype=torch.float32, device=x.device)
    launch(
        _lora_down_kernel,
        (tiles_m, parts, tiles_r),
        config,
        x,
        a,
        partial,
        m,
        k,
        r,
        x.stride(0),
        a.stride(0),
        a.stride(1),
        kept_scale(scale, threshold),
        seed,
        threshold,
        PADDED_R=padded_r,
        BLOCK_R=config.block_r,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        EVEN_K=k % config.block_k == 0,
        DROPOUT=threshold > 0,
        PRECISION=dot_precision(precision, x.dtype, target),
    )
    if parts > 1:
        sum_parts(partial, s)
    return s


def lora_epilogue(
    x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, *, precision: str
) -> torch.Tensor:
    """y [M, N] = x w^T + s b^T + bias, rounded once."""
    return _lora_gemm(x, w, s, b, bias, seed=0, threshold=0, precision=precision)


def lora_grad_x(
    dy: torch.Tensor, w: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, *, seed: int, threshold: int, precision: str
) -> torch.Tensor:
    """dx [M, K] = dy w + keep * (ds a), rounded once: the forward GEMM with w^T for w and a^T for b."""
    return _lora_gemm(dy, w.t(), ds, a.t(), None, seed=seed, threshold=threshold, precision=precision)


def _lora_gemm(x, w, s, b, bias, *, seed, threshold, precision):
    x = rows_contiguous(x)
    m, k = x.shape
    n, r = b.shape
    target = target_of(x.device)
    config = choose("gemm_dropout" if threshold else "gemm", target, M=m, N=n, R=r, dtype=x.dtype)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    launch(
        _lora_gemm_kernel,
        (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),),
        config,
        x,
        w,
        s,
        b,
        bias,
        y,
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
        DROPOUT=threshold > 0,
        PRECISION=dot_precision(precision, x.dtype, target),
    )
    return y
