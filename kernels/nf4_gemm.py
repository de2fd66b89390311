"""The QLoRA linear with the 4-bit weight decoded inside the GEMM: no weight of size N K is ever written.

    y  = x w^T + s b^T + bias                  nf4_lora_gemm    each tile of w is decoded once per tile of rows
    dx = dy w + keep * (ds a)                  nf4_lora_grad_x  the same kernel, w packed along the result's columns

    w(n, k) = round(codes[q(n, k)] * absmax(n, k // blocksize))     one product in float32, one rounding to x's dtype:
                                                                    bitsandbytes' dequantised weight, bit for bit

Shapes:  x [M, K], w a Packed [N, K] (nf4.py), s and ds [M, RP] (RP = padded_rank(R), zeros past R), b [N, R], a [R, K],
         bias [N], dy [M, N]; s with b, ds with a, and bias may be None. Every M, N, R >= 1; K as `in_loop_supports` says
Strides: any for a and b. x and dy may have any row stride; if their last axis is not contiguous they are copied, once
Dtypes:  x, dy, s, ds alike: float32, float16, bfloat16; a, b, bias in any of these, cast on load. Sums in float32
Dropout: as in lora.py: keep is drawn again from `seed`; threshold 0 keeps all and costs nothing
Sums:    up to SKINNY_ROWS rows the contraction is split over programs; a second kernel adds the float32 partial sums in
         the order of the parts, then s b^T and bias, and rounds once. No atomics: equal inputs give equal bits

`precision` is "ieee" or "tf32", for float32 products; it has no effect on float16 and bfloat16.
Source:  Dettmers et al. 2023, arXiv:2305.14314, section 3
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile
from fastpeft.kernels.launch import dot_precision, launch, rows_contiguous, target_of
from fastpeft.kernels.lora_gemm import add_low_rank, grouped_tile
from fastpeft.kernels.nf4 import Packed, load_table
from fastpeft.kernels.nf4_tiling import SUM_TILE, choose_nf4, split_contraction
from fastpeft.kernels.tiling import padded_rank

WEIGHTS_PER_WORD = tl.constexpr(8)
WORDS_PER_CHUNK = tl.constexpr(4)  # a chunk is 16 bytes, what a thread copies at once: 32 weights

_CHUNK_WEIGHTS = 32
_BLOCKSIZES = range(32, 4097)
_MOST_BLOCKS = 2**31  # block numbers are 32-bit in the kernel


@triton.jit
def _decode_words(words, absmax, table, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """w [ROWS, COLUMNS] of `dtype` from words [ROWS, COLUMNS // 8] int32 and absmax [ROWS, blocks in a row] float32.

    A word is four bytes, the first one lowest; of a byte the high four bits come first. Taken from words a code costs one
    shift and one mask; taken from bytes, one more instruction to pick the byte: 7.1 against 6.0 per weight. The 16-entry
    table is gathered from shared memory: 16 banks, equal words broadcast.
    """
    even_0 = tl.join((words >> 4) & 15, (words >> 20) & 15)  # elements 0 and 4 of the word's 8
    even_1 = tl.join((words >> 12) & 15, (words >> 28) & 15)  # 2 and 6
    odd_0 = tl.join(words & 15, (words >> 16) & 15)  # 1 and 5
    odd_1 = tl.join((words >> 8) & 15, (words >> 24) & 15)  # 3 and 7
    index = tl.join(tl.join(even_0, even_1), tl.join(odd_0, odd_1)).reshape(ROWS * COLUMNS)
    BLOCKS: tl.constexpr = absmax.shape[1]
    code = tl.gather(table, index, 0).reshape(ROWS, BLOCKS, COLUMNS // BLOCKS)
    return (code * absmax[:, :, None]).to(dtype).reshape(ROWS, COLUMNS)


@triton.jit
def _load_weights(
    w_ptr,
    absmax_ptr,
    nested_table,
    nested_absmax_ptr,
    nested_offset,
    table,
    rows,
    first_column,
    chunks_in_row,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):
    """w [ROWS, COLUMNS] of `dtype`: rows [ROWS] of the packed matrix, columns from first_column, a multiple of COLUMNS."""
    BLOCKS: tl.constexpr = COLUMNS // BLOCKSIZE if COLUMNS > BLOCKSIZE else 1
    row_words = rows[:, None].to(tl.int64) * (chunks_in_row * WORDS_PER_CHUNK)
    offs_words = first_column // WEIGHTS_PER_WORD + tl.arange(0, COLUMNS // WEIGHTS_PER_WORD)
    words = tl.load(w_ptr + row_words + offs_words[None, :])
    blocks_in_row = chunks_in_row * (WORDS_PER_CHUNK * WEIGHTS_PER_WORD) // BLOCKSIZE
    block = rows[:, None] * blocks_in_row + first_column // BLOCKSIZE + tl.arange(0, BLOCKS)[None, :]  # [ROWS, BLOCKS]
    if NESTED_BLOCKSIZE == 0:
        absmax = tl.load(absmax_ptr + block)
    else:
        if absmax_ptr.dtype.element_ty == tl.int32:  # four numbers a word: loads of single bytes are not pipelined
            index = (tl.load(absmax_ptr + (block >> 2)) >> ((block & 3) * 8)) & 255
        else:
            index = tl.load(absmax_ptr + block).to(tl.int32)
        code = tl.gather(nested_table, index.reshape(ROWS * BLOCKS), 0).reshape(ROWS, BLOCKS)
        scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE)
        # fma(x, y, 0) rounds the product; a plain product would be contracted with the sum into one rounding
        absmax = tl.fma(code, scale, 0.0) + nested_offset
    return _decode_words(words, absmax, table, dtype, ROWS, COLUMNS)


@triton.jit
def _store_with_bias(acc, y_ptr, bias_ptr, offs_m, offs_n, M, N, HAS_BIAS: tl.constexpr):
    """y [offs_m, offs_n] = acc + bias, rounded once."""
    mask_n = offs_n < N
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _nf4_gemm_kernel(
    x_ptr,
    w_ptr,
    absmax_ptr,
    codes_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    chunks_in_row,
    stride_bn,
    stride_br,
    seed: tl.int64,
    threshold,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ALONG_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    IN_PARTS: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N), parts of K); y [M, N] = x [M, K] w^T + keep * (s b^T) + bias
    # w is packed as [N, K], or ALONG_N as [K, N]: then what is here called N and K are the weight's K and N.
    # IN_PARTS: y is [parts, M, N] float32 and gets the plain products; _nf4_sum_kernel does the rest.
    # The decoded tile is the right operand: wgmma reads it from shared memory, where the left one would go through
    # registers (shared-memory cycles on sm_90, 256x128x64: 488 against 808 of the tensor cores' 1024).
    pid_m, pid_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    pid_k = tl.program_id(1)
    first_n = pid_n * BLOCK_N
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.where(offs_m < M, offs_m, 0).to(tl.int64)  # rows past M read row 0 and are not stored
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
    packed_n = tl.where(offs_n < N, offs_n, 0)  # so do columns past N
    table = load_table(codes_ptr)
    nested_table = tl.load(nested_code_ptr + tl.arange(0, 256)) if NESTED_BLOCKSIZE else table
    nested_offset = tl.load(nested_offset_ptr) if NESTED_BLOCKSIZE else 0.0

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:  # the mask covers the low-rank part only, so that part comes first
        acc = add_low_rank(acc, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION)
        acc = tl.where(keep_tile(seed, offs_m, first_n, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
    all_steps = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(all_steps, tl.num_programs(1))
    for step in range(pid_k * steps, min((pid_k + 1) * steps, all_steps)):
        k = step * BLOCK_K
        # x tile [BLOCK_M, BLOCK_K]
        if EVEN_K:
            x = tl.load(x_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=offs_k[None, :] < K - k, other=0.0)
        if ALONG_N:
            packed_k = k + offs_k if EVEN_K else tl.where(offs_k < K - k, k + offs_k, 0)
            w = _load_weights(
                w_ptr, absmax_ptr, nested_table, nested_absmax_ptr, nested_offset, table,
                packed_k, first_n, chunks_in_row, x.dtype, BLOCK_K, BLOCK_N, BLOCKSIZE, NESTED_BLOCKSIZE,
            )  # fmt: skip
        else:
            w = _load_weights(
                w_ptr, absmax_ptr, nested_table, nested_absmax_ptr, nested_offset, table,
                packed_n, k, chunks_in_row, x.dtype, BLOCK_N, BLOCK_K, BLOCKSIZE, NESTED_BLOCKSIZE,
            ).T  # fmt: skip
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if IN_PARTS:
        part_rows = pid_k.to(tl.int64) * M + offs_m[:, None]
        mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        tl.store(y_ptr + part_rows * N + offs_n[None, :], acc, mask=mask)
    else:
        if HAS_LOW_RANK and not DROPOUT:  # after the loop the tiles of s and b reuse its shared memory
            acc = add_low_rank(
                acc, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION
            )
        _store_with_bias(acc, y_ptr, bias_ptr, offs_m, offs_n, M, N, HAS_BIAS)


@triton.jit(do_not_specialize=["P", "M", "seed", "threshold"])
def _nf4_sum_kernel(
    parts_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    P,
    M,
    N,
    R,
    stride_bn,
    stride_br,
    seed: tl.int64,
    threshold,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N)); y [M, N] = sum over p of parts [P, M, N] + keep * (s b^T) + bias
    first_n = tl.program_id(1) * BLOCK_N
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    rows = tl.where(offs_m < M, offs_m, 0).to(tl.int64)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    part_ptrs = parts_ptr + rows[:, None] * N + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    part_size = tl.cast(M, tl.int64) * N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, P, loop_unroll_factor=4):
        acc += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += part_size
    if HAS_LOW_RANK:
        low_rank = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        low_rank = add_low_rank(
            low_rank, s_ptr, b_ptr, rows, offs_n, N, R, stride_bn, stride_br, PADDED_R, BLOCK_R, PRECISION
        )
        if DROPOUT:
            low_rank = tl.where(keep_tile(seed, offs_m, first_n, threshold, BLOCK_M, BLOCK_N), low_rank, 0.0)
        acc += low_rank
    _store_with_bias(acc, y_ptr, bias_ptr, offs_m, offs_n, M, N, HAS_BIAS)


def in_loop_supports(w: Packed) -> bool:
    """Can `w` be decoded inside a GEMM: blocks end with the rows, and every row starts on 16 bytes. Else: dequantise it."""
    n, k = w.shape
    return (
        w.blocksize in _BLOCKSIZES
        and k % w.blocksize == 0
        and k % _CHUNK_WEIGHTS == 0
        and n * k // w.blocksize < _MOST_BLOCKS
        and w.packed.storage_offset() % 16 == 0
    )


def nf4_lora_gemm(
    x: torch.Tensor,
    w: Packed,
    s: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    precision: str,
) -> torch.Tensor:
    """y [M, N] = x w^T + s b^T + bias, rounded once."""
    return _nf4_gemm(x, w, s, b, bias, along_n=False, seed=0, threshold=0, precision=precision)


def nf4_lora_grad_x(
    dy: torch.Tensor,
    w: Packed,
    ds: torch.Tensor | None,
    a: torch.Tensor | None,
    *,
    seed: int,
    threshold: int,
    precision: str,
) -> torch.Tensor:
    """dx [M, K] = dy w + keep * (ds a), rounded once: the forward GEMM over a weight that is packed the other way."""
    b = None if a is None else a.t()
    threshold = 0 if b is None else threshold
    return _nf4_gemm(dy, w, ds, b, None, along_n=True, seed=seed, threshold=threshold, precision=precision)


def _nf4_gemm(x, w, s, b, bias, *, along_n, seed, threshold, precision):
    """The letters are the GEMM's: y [M, N] = x [M, K] w^T, with w packed as [N, K] or, along_n, as [K, N]."""
    if not in_loop_supports(w):
        raise ValueError(
            f"nf4 in-loop GEMM: expected K a multiple of blocksize and of {_CHUNK_WEIGHTS}, and packed rows on 16 bytes, "
            f"got a weight {w.shape} of blocksize {w.blocksize}; dequantise it instead"
        )
    x = rows_contiguous(x)
    m, k = x.shape
    n, packed_row = (w.shape[1], w.shape[1]) if along_n else w.shape
    r = 0 if b is None else b.shape[1]
    target = target_of(x.device)
    config = choose_nf4("grad" if along_n else "gemm", target, M=m, N=n, K=k, R=r, dtype=x.dtype)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    parts = split_contraction(m, k, config, tiles, target)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    out = y if parts == 1 else torch.empty(parts, m, n, dtype=torch.float32, device=x.device)
    strides_b = (0, 0) if b is None else b.stride()
    nested_words = w.absmax.dtype == torch.uint8 and w.absmax.numel() % 4 == 0 and w.absmax.storage_offset() % 4 == 0
    epilogue = {
        "PADDED_R": padded_rank(r),
        "HAS_LOW_RANK": b is not None,
        "HAS_BIAS": bias is not None,
        "DROPOUT": threshold > 0,
        "PRECISION": dot_precision(precision, x.dtype, target),
    }
    nothing = {"HAS_LOW_RANK": False, "HAS_BIAS": False, "DROPOUT": False}
    launch(
        _nf4_gemm_kernel,
        (tiles, parts),
        config,
        x,
        w.packed.view(torch.int32),
        w.absmax.view(torch.int32) if nested_words else w.absmax,
        w.codes,
        w.nested_code,
        w.nested_absmax,
        w.nested_offset,
        s if parts == 1 else None,
        b if parts == 1 else None,
        bias if parts == 1 else None,
        out,
        m,
        n,
        k,
        r,
        x.stride(0),
        packed_row // _CHUNK_WEIGHTS,
        *strides_b,
        seed,
        threshold,
        BLOCKSIZE=w.blocksize,
        NESTED_BLOCKSIZE=w.nested_blocksize,
        BLOCK_R=config.block_r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        ALONG_N=along_n,
        EVEN_K=k % config.block_k == 0,
        IN_PARTS=parts > 1,
        **(epilogue if parts == 1 else epilogue | nothing),
    )
    if parts > 1:
        config = SUM_TILE
        launch(
            _nf4_sum_kernel,
            (triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)),
            config,
            out,
            s,
            b,
            bias,
            y,
            parts,
            m,
            n,
            r,
            *strides_b,
            seed,
            threshold,
            BLOCK_R=min(config.block_r, padded_rank(r)),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **epilogue,
        )
    return y
