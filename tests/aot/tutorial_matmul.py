"""Plain matrix products in the manner of Triton's tutorials, y = x w^T: what the LoRA kernels' GEMM is held against.

matmul             tutorial 03: one tile per program over pointers, tiles grouped for L2, rows wrapped instead of masked
matmul_persistent  tutorial 09: one program per processor walks over tiles, tiles moved by tensor descriptors

Written for this comparison, from the tutorials' ideas: the same arguments as lora_gemm.py, without rank, bias and dropout.
The persistent one does not flatten its two loops: flattened, its set-up and stores are part of the loop's code and jumped
over in most turns, so that instructions per K step could not be counted.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpeft.kernels.launch import launch, target_of
from fastpeft.kernels.lora_gemm import grouped_tile
from fastpeft.kernels.tiling import TileConfig


@triton.jit
def _matmul_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),)
    pid_m, pid_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    columns = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + columns[None, :] * stride_wn + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k * BLOCK_K, other=0.0)
        w = tl.load(w_ptrs, mask=offs_k[:, None] < K - k * BLOCK_K, other=0.0)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _matmul_persistent_kernel(
    x_desc,
    w_desc,
    y_desc,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # grid (PROGRAMS,)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        pid_m, pid_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([pid_m * BLOCK_M, k])
            w = w_desc.load([pid_n * BLOCK_N, k])
            acc = tl.dot(x, w.T, acc)
        y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc.to(y_desc.dtype))


def matmul(x: torch.Tensor, w: torch.Tensor, config: TileConfig) -> torch.Tensor:
    """y [M, N] = x [M, K] w [N, K]^T over pointers."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    launch(_matmul_kernel, grid, config, x, w, y, m, n, k, x.stride(0), w.stride(0), **_tile(config))
    return y


def matmul_persistent(x: torch.Tensor, w: torch.Tensor, config: TileConfig) -> torch.Tensor:
    """y [M, N] = x [M, K] w [N, K]^T over descriptors; rows of x, w and y on 16 bytes."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    descriptors = (
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(w, [block_n, block_k]),
        TensorDescriptor.from_tensor(y, [block_m, block_n]),
    )
    programs = target_of(x.device).processors
    launch(_matmul_persistent_kernel, (programs,), config, *descriptors, m, n, k, **_tile(config), PROGRAMS=programs)
    return y


def _tile(config: TileConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
