"""The LoRA linear over a dense base: S = x a^T, then one GEMM whose epilogue adds S b^T, and the same GEMM for dx.

    c  = scale / (1 - threshold / 65536)
    s  = c * (keep * x) a^T                    lora_down      reads x once
    y  = x w^T + s b^T + bias                  lora_epilogue  reads s, b, bias once per tile of y, after the K loop;
                                                              with a gain, y = gain * (x w^T + s b^T) + bias (DoRA)
    ds = c * dy b,   db = dy^T s               lora_grad_s_b  reads dy once            (lora_grad.py)
    dx = dy w + keep * (ds a)                  lora_grad_x    the same GEMM, w and b transposed
    da = ds^T (keep * x)                       lora_grad_a    reads x once             (lora_grad.py)

Shapes:  x [M, K], w [N, K], a [R, K], b [N, R], bias [N] or None, dy [M, N]; s and ds [M, RP], RP = padded_rank(R), with
         zeros past column R. Every M, N, K, R >= 1. y, dx, s, ds, da, db come back freshly allocated and contiguous
Strides: any for w, a, b. x and dy may have any row stride; if their last axis is not contiguous they are copied, once.
         Rows of x, w and dy that do not start on 16 bytes are correct, and several times slower
Dtypes:  x, w, s, dy alike: float32, float16, bfloat16. a, b, bias in any of these: cast to x's dtype on load. Sums in
         float32; c multiplies s and ds in float32 before their only rounding, so that a and b are never scaled
Dropout: keep is drawn again in each kernel from `seed` (dropout.py); threshold 0 keeps all and costs nothing
Sums:    no atomics: equal inputs give equal bits
Forms:   the GEMM runs over pointers (lora_gemm.py), or over tensor descriptors where the GPU has a TMA unit (lora_tma.py)

`precision` is "ieee" or "tf32", for float32 products; it has no effect on float16 and bfloat16.
Source:  Hu et al. 2021, arXiv:2106.09685, section 4.1
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile, kept_scale, lora_keep
from fastpeft.kernels.launch import dot_precision, launch, rows_contiguous, target_of
from fastpeft.kernels.lora_gemm import lora_gemm_pointers
from fastpeft.kernels.lora_grad import lora_grad_a, lora_grad_s_b
from fastpeft.kernels.lora_tma import lora_gemm_tma, prefers_descriptors, takes_descriptors
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


def lora_down(
    x: torch.Tensor,
    a: torch.Tensor,
    *,
    scale: float,
    seed: int,
    threshold: int,
    precision: str,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """s [M, RP] = c * (keep * x) a^T in `out_dtype` (x's if None): one read of x.

    Split over K where the rows alone would not fill the GPU.
    """
    x = rows_contiguous(x)
    m, k = x.shape
    r, padded_r = a.shape[0], padded_rank(a.shape[0])
    target = target_of(x.device)
    config = choose("down_dropout" if threshold else "down", target, M=m, N=r, R=r, dtype=x.dtype)
    tiles_m, tiles_r = triton.cdiv(m, config.block_m), triton.cdiv(padded_r, config.block_r)
    parts, _ = parts_along(k, config.block_k, tiles_m * tiles_r, target)
    s = torch.empty(m, padded_r, dtype=out_dtype or x.dtype, device=x.device)
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
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gain: torch.Tensor | None = None,
    precision: str,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] = x w^T + s b^T + bias, rounded once. With gain [N] float32: (y, z), z = x w^T + s b^T, y = gain * z + bias.

    Both are rounded once, from the same sums: y is not gain times the rounded z.
    """
    y, z = _lora_gemm(x, w, s, b, bias, gain, seed=0, threshold=0, precision=precision)
    return y if gain is None else (y, z)


def lora_grad_x(
    dy: torch.Tensor, w: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, *, seed: int, threshold: int, precision: str
) -> torch.Tensor:
    """dx [M, K] = dy w + keep * (ds a), rounded once: the forward GEMM with w^T for w and a^T for b."""
    return _lora_gemm(dy, w.t(), ds, a.t(), None, None, seed=seed, threshold=threshold, precision=precision)[0]


def _lora_gemm(x, w, s, b, bias, gain, *, seed, threshold, precision):
    """(y, z or None) over descriptors where the GPU has a TMA unit and x and w allow it, else over pointers."""
    x = rows_contiguous(x)
    n, r = b.shape
    target = target_of(x.device)
    op = "gemm_dropout" if threshold else "gemm" if gain is None else "gemm_gain"
    config = choose(op, target, M=x.shape[0], N=n, R=r, dtype=x.dtype)
    descriptors = prefers_descriptors(target, config) and takes_descriptors(x, w)
    gemm = lora_gemm_tma if descriptors else lora_gemm_pointers
    return gemm(x, w, s, b, bias, gain, config, seed=seed, threshold=threshold, precision=precision)
