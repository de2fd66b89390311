"""The GEMM of lora_gemm.py over tensor descriptors: on sm_90 and sm_100 the TMA unit fetches its tiles.

    z = x w^T + keep * (s b^T),    y = gain * z + bias

One thread asks for a whole tile, and the hardware fills what lies past an edge with zeros: no addresses and no masks in
the loop, for any M, N and K. On sm_90 the loop is 90 instructions per K step instead of 128 (128x256x64, 8 warps).
The low-rank part and the stores go over pointers: they run once per tile, and reuse the loop's shared memory.

Shapes, dtypes and rounding as in lora_gemm.py; equal tiles give equal bits. w is [N, K] with either axis contiguous.
Limits:  what a descriptor can hold: `takes_descriptors`
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpeft.kernels.dropout import keep_tile
from fastpeft.kernels.launch import dot_precision, launch, target_of
from fastpeft.kernels.lora_gemm import add_low_rank, grouped_tile, store_outputs
from fastpeft.kernels.tiling import Target, TileConfig, padded_rank

ALIGNMENT = 16  # bytes, of a descriptor's address and row stride
ARCHS = ("sm_90", "sm_100", "sm_103")


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _lora_gemm_tma_kernel(
    x_desc,
    w_desc,
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
    W_BY_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),); w_desc: [N, K] if W_BY_ROWS, else [K, N]
    pid_m, pid_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.where(offs_m < M, offs_m, 0).to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:  # the mask covers the low-rank part only, so that part comes first
        acc = add_low_rank(acc, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION)
        acc = tl.where(keep_tile(seed, offs_m, pid_n * BLOCK_N, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([pid_m * BLOCK_M, k])  # [BLOCK_M, BLOCK_K]
        if W_BY_ROWS:
            w = w_desc.load([pid_n * BLOCK_N, k]).T  # [BLOCK_K, BLOCK_N]
        else:
            w = w_desc.load([k, pid_n * BLOCK_N])
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if not DROPOUT:
        acc = add_low_rank(acc, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION)
    store_outputs(
        acc, y_ptr, z_ptr, gain_ptr, bias_ptr, offs_m, offs_n, pid_n * BLOCK_N, M, N, BLOCK_N, HAS_GAIN, HAS_BIAS
    )


def takes_descriptors(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether descriptors can hold x [M, K] and w [N, K] as they lie: 16-byte addresses and strides, one axis contiguous.

    float32 is left to the pointers: its products do not run on the unit that TMA feeds.
    """
    return x.dtype.itemsize == 2 and _describable(x) and (_describable(w) or _describable(w.t()))


def _describable(matrix: torch.Tensor) -> bool:
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and row_bytes > 0 and row_bytes % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


def prefers_descriptors(target: Target, config: TileConfig) -> bool:
    """Where they are faster: on a TMA unit, with tiles of a warpgroup's rows."""
    return target.arch in ARCHS and config.block_m >= 64


def lora_gemm_tma(
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
    """y and z (None without gain) of x [M, K] and w [N, K] for which `takes_descriptors` holds."""
    m, k = x.shape
    n, r = b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    z = None if gain is None else torch.empty_like(y)
    by_rows = _describable(w)
    w_desc = (
        TensorDescriptor.from_tensor(w, [config.block_n, config.block_k])
        if by_rows
        else TensorDescriptor.from_tensor(w.t(), [config.block_k, config.block_n])
    )
    launch(
        _lora_gemm_tma_kernel,
        (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),),
        config,
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        w_desc,
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
        W_BY_ROWS=by_rows,
        HAS_BIAS=bias is not None,
        HAS_GAIN=gain is not None,
        DROPOUT=threshold > 0,
        PRECISION=dot_precision(precision, x.dtype, target_of(x.device)),
    )
    return y, z
