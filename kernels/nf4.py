"""4-bit weights (NF4, FP4) in bitsandbytes' layout: quantise, dequantise, and dequantise with a low-rank update added.

    q(i)   = order[number of bounds < w(i) / absmax(i // G)],     absmax(g) = max |w| over block g of G elements
    w^(i)  = codes[q(i)] * absmax(i // G)                          nf4_dequantize  reads packed once, writes w^ once
    w'     = w^ + scale * b a, rounded once                        nf4_merge       the same, and b a by tensor cores

i counts the elements of w [N, K] row by row: blocks run across the ends of rows, and the last one may be short. A byte holds
elements 2j (high four bits) and 2j + 1. With double quantisation absmax itself is 8-bit:
    absmax(g) = nested_code[absmax_q(g)] * nested_absmax(g // nested_blocksize) + nested_offset, each step rounded to float32.

Shapes:  packed [ceil(N K / 2)] uint8, absmax [ceil(N K / G)], codes [16], a [R, K], b [N, R]; every N, K, R >= 1
Dtypes:  w, results, a, b: float32, float16, bfloat16; absmax float32, or uint8 with double quantisation
Bits:    nf4_dequantize gives code * absmax in float32, cast once: bitsandbytes' values bit for bit. nf4_quantize gives its
         bytes: whole blocks are multiplied by the reciprocal of absmax, clamped at 1e-38; the short last one is divided
Sums:    no atomics: equal inputs give equal bits

Source:  Dettmers et al. 2023, arXiv:2305.14314, section 3
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import dot_precision, launch, target_of
from fastpeft.kernels.tiling import TileConfig, padded_rank

SMALLEST_ABSMAX = tl.constexpr(1e-38)
BOUNDS = tl.constexpr(15)

# Packed bytes that a program of 4 warps takes; larger blocks take one block per program. Dequantising (sm_90, sm_80; bfloat16,
# nested): 8.5 instructions per weight with two 16-byte loads per thread, 11 with one, which on gfx942 is one of 8 bytes.
# Quantising takes 77 either way, 168 to 193 registers with 4096 bytes, 96 with 2048.
_DEQUANTIZE_BYTES = 4096
_QUANTIZE_BYTES = 2048
# Merge, at R = 16 in bfloat16: 12.5 instructions per weight (sm_90, sm_80), 16-byte loads and stores, 3 programs per SM.
# Rejected: 8 warps or 32 rows (17 to 22 instructions). Float32 adapters over half precision spill 50 registers on sm_80 with
# 4 warps, and float32 products, which run outside the tensor cores, 236 to 2779 in any tile of 4096 sums and up.
_MERGE_TILE = TileConfig(block_m=64, block_n=1, block_k=128, block_r=64, num_warps=4, num_stages=1)
_MERGE_TILE_FLOAT32_ADAPTERS = TileConfig(block_m=64, block_n=1, block_k=128, block_r=64, num_warps=8, num_stages=1)
_MERGE_TILE_FLOAT32 = TileConfig(block_m=32, block_n=1, block_k=64, block_r=16, num_warps=4, num_stages=1)


class Packed(NamedTuple):
    """The tensors of a 4-bit weight [N, K], flat and contiguous; the three `nested_` tensors are None without double quant."""

    packed: torch.Tensor  # uint8 [ceil(N K / 2)]
    absmax: torch.Tensor  # float32 [blocks], or uint8 [blocks] with double quantisation
    codes: torch.Tensor  # float32 [16]
    shape: tuple[int, int]
    blocksize: int
    nested_code: torch.Tensor | None = None  # float32 [256]
    nested_absmax: torch.Tensor | None = None  # float32 [ceil(blocks / nested_blocksize)]
    nested_offset: torch.Tensor | None = None  # float32, no dimension
    nested_blocksize: int = 0  # 0 without double quantisation


@triton.jit
def load_table(codes_ptr):
    """The 16 float32 codes, for `decode_nibbles`; load them once, before any loop."""
    return tl.load(codes_ptr + tl.arange(0, 16))


@triton.jit
def decode_nibbles(packed_bytes, table):
    """(high, low): the codes of the high and the low four bits of every byte, float32, in the shape of packed_bytes.

    tl.gather over 16 words is one shared-memory read per weight (16 banks, equal words broadcast) and exact.
    """
    index = packed_bytes.to(tl.int32).reshape(packed_bytes.numel)
    high = tl.gather(table, index >> 4, 0).reshape(packed_bytes.shape)
    low = tl.gather(table, index & 15, 0).reshape(packed_bytes.shape)
    return high, low


@triton.jit
def load_absmax(
    absmax_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    block,
    mask,
    NESTED_BLOCKSIZE: tl.constexpr,  # 0: absmax is float32 as it lies
):
    """absmax of the quantisation blocks numbered `block`, float32; 0 where `mask` is off."""
    if NESTED_BLOCKSIZE == 0:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:
        quantised = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        code = tl.load(nested_code_ptr + quantised, mask=mask, other=0.0)
        scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        # fma(x, y, 0) rounds the product; a plain product would be contracted with the sum into one rounding
        return tl.fma(code, scale, 0.0) + tl.load(nested_offset_ptr)


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    codes_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    out_ptr,
    ELEMENTS,
    BYTES,
    BLOCKS,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
):  # grid (cdiv(BLOCKS, GROUP),); program: GROUP blocks of BLOCKSIZE elements
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < BYTES, other=0)  # [GROUP, HALF]
    absmax = load_absmax(
        absmax_ptr, nested_code_ptr, nested_absmax_ptr, nested_offset_ptr, block, block < BLOCKS, NESTED_BLOCKSIZE
    )
    high, low = decode_nibbles(packed, load_table(codes_ptr))
    w = tl.join(high * absmax[:, None], low * absmax[:, None]).reshape(GROUP, BLOCKSIZE)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + element, w.to(out_ptr.dtype.element_ty), mask=element < ELEMENTS)


@triton.jit
def _nf4_quantize_kernel(
    w_ptr,
    bounds_ptr,
    order_ptr,
    packed_ptr,
    absmax_ptr,
    ELEMENTS,
    BYTES,
    BLOCKS,
    BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
):  # grid (cdiv(BLOCKS, GROUP),); program: GROUP blocks of BLOCKSIZE elements
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    w = tl.load(w_ptr + element, mask=element < ELEMENTS, other=0.0).to(tl.float32)  # [GROUP, BLOCKSIZE]
    size = tl.abs(w)
    absmax = tl.max(tl.where(size < float("inf"), size, float("inf")), axis=1)  # a NaN or an infinity shows as infinity
    short = (block + 1) * BLOCKSIZE > ELEMENTS  # the last block, if it is not whole
    divisor = tl.maximum(absmax, tl.full((GROUP,), SMALLEST_ABSMAX, tl.float32))
    scaled = w * tl.div_rn(tl.full((GROUP,), 1.0, tl.float32), divisor)[:, None]
    if (tl.program_id(0) + 1).to(tl.int64) * GROUP * BLOCKSIZE > ELEMENTS:
        by_division = tl.div_rn(w, tl.broadcast_to(divisor[:, None], (GROUP, BLOCKSIZE)))
        scaled = tl.where(short[:, None], by_division, scaled)
        absmax = tl.where(short, divisor, absmax)
    above = tl.zeros((GROUP, BLOCKSIZE), tl.int32)  # bounds that lie below: a tie goes to the lower code
    for i in tl.static_range(BOUNDS):
        above += (scaled > tl.load(bounds_ptr + i)).to(tl.int32)
    order = tl.load(order_ptr + tl.arange(0, 16)).to(tl.int32)
    codes = tl.gather(order, above.reshape(GROUP * BLOCKSIZE), 0)
    high, low = tl.split(codes.reshape(GROUP, HALF, 2))
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + byte, (high * 16 + low).to(tl.uint8), mask=byte < BYTES)
    tl.store(absmax_ptr + block, absmax, mask=block < BLOCKS)


@triton.jit
def _nf4_merge_kernel(
    packed_ptr,
    absmax_ptr,
    codes_ptr,
    nested_code_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    N,
    K,
    R,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scale,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,  # K % BLOCKSIZE == 0: blocks end with the rows
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(K, BLOCK_K), cdiv(N, BLOCK_N)); out [N, K]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = tl.program_id(0) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask_n = offs_n[:, None] < N
    mask = mask_n & (offs_k[None, :] < K)
    rows = offs_n[:, None].to(tl.int64)
    table = load_table(codes_ptr)

    if WHOLE_ROWS:
        CHUNK: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BLOCK_K else BLOCK_K
        CHUNKS: tl.constexpr = BLOCK_K // CHUNK
        HALF: tl.constexpr = BLOCK_K // 2
        offs_byte = first_k // 2 + tl.arange(0, HALF)
        byte_mask = mask_n & (offs_byte[None, :] < K // 2)
        packed = tl.load(packed_ptr + rows * (K // 2) + offs_byte[None, :], mask=byte_mask, other=0)  # [BLOCK_N, HALF]
        chunk_k = first_k + tl.arange(0, CHUNKS) * CHUNK
        absmax = load_absmax(
            absmax_ptr,
            nested_code_ptr,
            nested_absmax_ptr,
            nested_offset_ptr,
            rows * (K // BLOCKSIZE) + chunk_k[None, :] // BLOCKSIZE,
            mask_n & (chunk_k[None, :] < K),
            NESTED_BLOCKSIZE,
        )[:, :, None]  # [BLOCK_N, CHUNKS, 1]
        high, low = decode_nibbles(packed, table)
        high = high.reshape(BLOCK_N, CHUNKS, CHUNK // 2) * absmax
        low = low.reshape(BLOCK_N, CHUNKS, CHUNK // 2) * absmax
        w = tl.join(high, low).reshape(BLOCK_N, BLOCK_K)
    else:
        element = rows * K + offs_k[None, :]
        packed = tl.load(packed_ptr + element // 2, mask=mask, other=0)
        absmax = load_absmax(
            absmax_ptr,
            nested_code_ptr,
            nested_absmax_ptr,
            nested_offset_ptr,
            element // BLOCKSIZE,
            mask,
            NESTED_BLOCKSIZE,
        )
        high, low = decode_nibbles(packed, table)
        w = tl.where(element % 2 == 0, high, low) * absmax

    delta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for first_rank in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
        offs_r = first_rank + tl.arange(0, BLOCK_R)
        b_offsets = rows * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptr + b_offsets, mask=mask_n & (offs_r[None, :] < R), other=0.0)  # [BLOCK_N, BLOCK_R]
        a_offsets = offs_r[:, None].to(tl.int64) * stride_ar + offs_k[None, :].to(tl.int64) * stride_ak
        a = tl.load(a_ptr + a_offsets, mask=(offs_r[:, None] < R) & (offs_k[None, :] < K), other=0.0)
        delta = tl.dot(b.to(dtype), a.to(dtype), delta, input_precision=PRECISION)
    tl.store(out_ptr + rows * K + offs_k[None, :], (w + scale * delta).to(dtype), mask=mask)


def nf4_dequantize(w: Packed, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """w^ [N, K] in `dtype`: one read of the packed weight, one write; into `out` (contiguous, of `dtype`) if given."""
    n, k = w.shape
    out = torch.empty(n, k, dtype=dtype, device=w.packed.device) if out is None else out
    group, config = _blocks_per_program(w.blocksize, _DEQUANTIZE_BYTES)
    launch(
        _nf4_dequantize_kernel,
        (triton.cdiv(w.absmax.numel(), group),),
        config,
        w.packed,
        w.absmax,
        w.codes,
        w.nested_code,
        w.nested_absmax,
        w.nested_offset,
        out,
        n * k,
        w.packed.numel(),
        w.absmax.numel(),
        BLOCKSIZE=w.blocksize,
        NESTED_BLOCKSIZE=w.nested_blocksize,
        GROUP=group,
    )
    return out


def nf4_quantize(
    w: torch.Tensor, bounds: torch.Tensor, order: torch.Tensor, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, absmax) of w, any shape: one read of w. bounds float32 [15] ascending; order uint8 [16], codes by rank.

    A block with a NaN or an infinity gets absmax = infinity.
    """
    w = w.contiguous()
    elements = w.numel()
    blocks = triton.cdiv(elements, blocksize)
    packed = torch.empty(triton.cdiv(elements, 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=w.device)
    group, config = _blocks_per_program(blocksize, _QUANTIZE_BYTES)
    launch(
        _nf4_quantize_kernel,
        (triton.cdiv(blocks, group),),
        config,
        w,
        bounds,
        order,
        packed,
        absmax,
        elements,
        packed.numel(),
        blocks,
        BLOCKSIZE=blocksize,
        GROUP=group,
    )
    return packed, absmax


def nf4_merge(
    w: Packed,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    precision: str = "ieee",
) -> torch.Tensor:
    """w^ + scale * b a [N, K] in `dtype`, rounded once; w^ is never written. a and b are cast to `dtype` on load."""
    n, k = w.shape
    r = a.shape[0]
    out = torch.empty(n, k, dtype=dtype, device=w.packed.device) if out is None else out
    target = target_of(w.packed.device)
    padded_r, config = padded_rank(r), _merge_tile(dtype, a.dtype, b.dtype)
    launch(
        _nf4_merge_kernel,
        (triton.cdiv(k, config.block_k), triton.cdiv(n, config.block_m)),
        config,
        w.packed,
        w.absmax,
        w.codes,
        w.nested_code,
        w.nested_absmax,
        w.nested_offset,
        a,
        b,
        out,
        n,
        k,
        r,
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        scale,
        BLOCKSIZE=w.blocksize,
        NESTED_BLOCKSIZE=w.nested_blocksize,
        WHOLE_ROWS=k % w.blocksize == 0,
        PADDED_R=padded_r,
        BLOCK_R=min(padded_r, config.block_r),
        BLOCK_N=config.block_m,
        BLOCK_K=config.block_k,
        PRECISION=dot_precision(precision, dtype, target),
    )
    return out


def _merge_tile(dtype: torch.dtype, *adapter_dtypes: torch.dtype) -> TileConfig:
    if dtype == torch.float32:
        return _MERGE_TILE_FLOAT32
    return _MERGE_TILE_FLOAT32_ADAPTERS if torch.float32 in adapter_dtypes else _MERGE_TILE


def _blocks_per_program(blocksize: int, packed_bytes: int) -> tuple[int, TileConfig]:
    """Quantisation blocks that one program takes, and its warps."""
    group = max(1, packed_bytes // (blocksize // 2))
    return group, TileConfig(block_m=group, block_n=blocksize, block_k=1, block_r=1, num_warps=4, num_stages=1)
