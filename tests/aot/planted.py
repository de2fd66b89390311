"""Kernels with one known fault each, and one without: the gates must tell them apart (see test_gates.py)."""

import triton
import triton.language as tl

from fastpeft.kernels.aot_cases import AotCase

FAULTS = ("none", "spill", "atomics", "shared memory", "narrow loads", "slow tensor cores", "repeated work")


@triton.jit
def _matmul_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K, stride_xm, stride_wn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ATOMIC: tl.constexpr
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.where(offs_m < M, offs_m, 0)[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + tl.where(offs_n < N, offs_n, 0)[None, :] * stride_wn + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    if ATOMIC:
        tl.atomic_add(y_ptrs, acc, mask=mask)
    else:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def aot_cases(arch: str) -> list[AotCase]:
    """One case per fault, named after it."""
    return [_case(fault, arch) for fault in FAULTS]


def _case(fault: str, arch: str) -> AotCase:
    nvidia = arch.startswith("sm_")
    block_m, block_n, block_k, num_warps, num_stages = 128, 128, 32, 8, 3 if nvidia else 2
    if fault == "spill":
        block_n, block_m, num_warps = 256, 128 if nvidia else 256, 4
    elif fault == "shared memory":
        block_k, num_stages = 128, 5
    elif fault == "slow tensor cores":  # wgmma needs four warps
        block_m, block_n, num_warps = 64, 32, 2
    elif fault == "repeated work":
        block_m, block_n, block_k = 16, 16, 64
    constexprs = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "ATOMIC": fault == "atomics"}
    pointers = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*fp32" if fault == "atomics" else "*bf16"}
    sizes = dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn"), "i32")
    divisible = (0, 1, 2) if fault == "narrow loads" else (0, 1, 2, 4, 5, 6, 7)
    return AotCase(
        name=fault,
        kernel=_matmul_kernel,
        signature={**pointers, **sizes, **dict.fromkeys(constexprs, "constexpr")},
        constexprs=constexprs,
        divisible=divisible,
        num_warps=num_warps,
        num_stages=num_stages,
        tile_fma=block_m * block_n * block_k,
    )
