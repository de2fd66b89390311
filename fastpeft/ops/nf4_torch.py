"""4-bit storage by library calls: what a CPU runs, and any device on request. Layout and rounding: fastpeft/reference/nf4.py.

Both directions work in chunks that stay in a core's cache, through buffers that are made once per call.
"""

import ctypes
import functools
from collections.abc import Callable

import torch

from fastpeft.ops.tracing import constants
from fastpeft.reference import nf4 as reference

_CHUNK = 1 << 17  # elements: 512 KiB of float32
_NATIVE_BLOCKSIZE = 1024  # bitsandbytes' AVX512 routine is exact up to here; larger blocks are given to it in pieces
_NATIVE_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Quantisation looks the code up by a scaled weight's place among 65535 bins, and compares with the 15 bounds only near
# those (0.07% of the bins). One thread, ns per element of 2048 x 2048 float32: 15 compares 18 to 40 (each 0.9, since it
# writes booleans), bucketize 50, 4095 bins 7.6, 16383 bins 4.6, 65535 bins 4.0; bitsandbytes 39.
_HALF_BINS = 32767
_NEAR_A_BOUND = 128
_EIGHT_MARKS = int.from_bytes(bytes([_NEAR_A_BOUND] * 8), "little", signed=True)


def quantize(w: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, absmax) of a contiguous w.

    From the chunk of a NaN or an infinity on, absmax is infinity and packed undefined: the caller refuses such a weight.
    """
    flat = w.view(-1)
    elements, whole = flat.numel(), flat.numel() // blocksize
    packed = torch.empty(-(-elements // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-elements // blocksize), dtype=torch.float32, device=w.device)
    if whole:
        _quantize_whole_blocks(flat[: whole * blocksize].view(whole, blocksize), quant_type, packed, absmax)
    if whole < absmax.numel():
        rest, scale = reference.quantize(flat[whole * blocksize :].cpu(), quant_type, blocksize)
        packed[whole * blocksize // 2 :].copy_(rest)
        absmax[whole:].copy_(scale)
    return packed, absmax


def _quantize_whole_blocks(blocks: torch.Tensor, quant_type: str, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    count, blocksize = blocks.shape
    step = min(count, max(1, _CHUNK // blocksize))
    code_of_bin, bounds, order = _bins_on(quant_type, blocks.device)
    middle = torch.tensor(float(_HALF_BINS), device=blocks.device)
    make = functools.partial(torch.empty, device=blocks.device)
    values, work, reciprocals = make(step, blocksize), make(step, blocksize), make(step)
    bins, codes = make(step * blocksize, dtype=torch.int32), make(step * blocksize, dtype=torch.uint8)
    marks, low = make(step * blocksize // 8, dtype=torch.int64), make(step * blocksize // 2, dtype=torch.int16)
    for first in range(0, count, step):
        rows = min(step, count - first)
        size = rows * blocksize
        chunk = blocks[first : first + rows]
        chunk = chunk if chunk.dtype == torch.float32 else values[:rows].copy_(chunk)
        scales = torch.amax(torch.abs(chunk, out=work[:rows]), 1, out=absmax[first : first + rows])
        if not scales.amax() < float("inf"):
            absmax[first:] = float("inf")
            return
        torch.clamp(scales, min=reference.SMALLEST_ABSMAX, out=reciprocals[:rows]).reciprocal_()
        scaled = torch.mul(chunk, reciprocals[:rows, None], out=values[:rows])
        torch.add(middle, scaled, alpha=_HALF_BINS, out=work[:rows])
        bins[:size].copy_(work[:rows].view(-1))
        torch.index_select(code_of_bin, 0, bins[:size], out=codes[:size])
        marked = torch.bitwise_and(codes[:size].view(torch.int64), _EIGHT_MARKS, out=marks[: size // 8]).nonzero()[:, 0]
        if marked.numel():
            exact = torch.bucketize(scaled.view(-1, 8)[marked], bounds)
            codes.view(-1, 8)[marked] = order[exact]
        # a pair of codes as one little-endian number: low byte first = element 2j, which goes to the high four bits
        pairs = codes[:size].view(torch.int16)
        torch.bitwise_right_shift(pairs, 8, out=low[: size // 2])
        start = first * blocksize // 2
        packed[start : start + size // 2].copy_(pairs.mul_(16).bitwise_or_(low[: size // 2]))


@constants
def _bins_on(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(code of each bin, bounds, code of each rank). A value's bin is int(_HALF_BINS (value + 1)).

    That grows with the value, so a bin between two bounds' bins has one code. The bins of the bounds and their neighbours, in
    case the sum is rounded otherwise in vectors than alone, are marked: there the bounds decide.
    """
    bounds, order = reference.ranks(quant_type)
    bin_of_bound = (_HALF_BINS + _HALF_BINS * bounds).long()
    bins = torch.arange(2 * _HALF_BINS + 2)[:, None]
    near = ((bins - bin_of_bound).abs() <= 1).any(1)
    codes = order[(bins > bin_of_bound).sum(1)].masked_fill_(near, _NEAR_A_BOUND)
    return codes.to(device), bounds.to(device), order.to(device)


def dequantize_absmax(
    quantised: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor, blocksize: int
) -> torch.Tensor:
    """float32 [blocks] = code[quantised] * absmax(block // blocksize), rounded, + offset."""
    values = code.index_select(0, quantised.int())
    whole = values.numel() // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize, None])
    if whole < values.numel():
        values[whole:].mul_(absmax[-1])
    return values.add_(offset)


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """w^ [N, K] in `dtype`, from float32 absmax; in `out` (contiguous) if given."""
    out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    flat = out.view(-1)
    done = 0
    native = _native(quant_type, dtype) if packed.device.type == "cpu" else None
    if native is not None:
        done = flat.numel() // blocksize
        native(packed, absmax, flat, blocksize, done)
    _dequantize_chunks(packed, absmax, quant_type, blocksize, flat, done)
    return out


def _dequantize_chunks(packed, absmax, quant_type, blocksize, flat, first_block) -> None:
    """Blocks from first_block on: both codes of a byte by one look-up of 8 bytes."""
    elements = flat.numel()
    pairs = _pairs_on(quant_type, packed.device)
    step = max(1, _CHUNK // blocksize)
    for block in range(first_block, absmax.numel(), step):
        start, end = block * blocksize, min((block + step) * blocksize, elements)
        codes = pairs.index_select(0, packed[start // 2 : -(-end // 2)].int()).view(torch.float32)[: end - start]
        whole = codes.numel() // blocksize
        flat[start : start + whole * blocksize].view(-1, blocksize).copy_(
            codes[: whole * blocksize].view(-1, blocksize).mul_(absmax[block : block + whole, None])
        )
        if whole * blocksize < codes.numel():
            flat[start + whole * blocksize : end].copy_(codes[whole * blocksize :].mul_(absmax[block + whole]))


@constants
def _pairs_on(quant_type: str, device: torch.device) -> torch.Tensor:
    """[256] of 8 bytes: the float32 codes of a byte's high and low four bits, as one element."""
    codes = reference.codes(quant_type)
    byte = torch.arange(256)
    return torch.stack([codes[byte >> 4], codes[byte & 15]], 1).view(torch.float64).view(-1).to(device)


_Native = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], None]


@functools.cache
def _native(quant_type: str, dtype: torch.dtype) -> _Native | None:
    """bitsandbytes' routine for whole blocks on a CPU, or None where it is missing or not exact on this machine.

    It is given rows of one block each. Called as bitsandbytes calls it, with the rows of w, it mistakes the scale where K is
    no multiple of the block size; a short last block would come out with other signs of zero.
    """
    name = _NATIVE_DTYPES.get(dtype)
    if name is None:
        return None
    try:
        from bitsandbytes.cextension import lib

        routine = getattr(lib, f"cdequantize_blockwise_cpu_{quant_type}_{name}")
    except (ImportError, OSError, AttributeError):
        return None

    def run(packed: torch.Tensor, absmax: torch.Tensor, flat: torch.Tensor, blocksize: int, blocks: int) -> None:
        if blocksize > _NATIVE_BLOCKSIZE:
            pieces = blocksize // _NATIVE_BLOCKSIZE
            absmax = absmax[:blocks].repeat_interleave(pieces)
            blocks, blocksize = blocks * pieces, _NATIVE_BLOCKSIZE
        if blocks:
            addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, absmax, flat))
            routine(*addresses, *map(ctypes.c_longlong, (blocksize, blocks, blocksize)))

    return run if all(_is_exact(run, quant_type, dtype, blocksize) for blocksize in (32, 64, 1024)) else None


def _is_exact(run: _Native, quant_type: str, dtype: torch.dtype, blocksize: int) -> bool:
    blocks = 9
    packed = (torch.arange(blocks * blocksize // 2) * 37 % 256).to(torch.uint8)
    absmax = torch.linspace(1e-3, 3.0, blocks)
    got = torch.empty(blocks, blocksize, dtype=dtype)
    run(packed, absmax, got, blocksize, blocks)
    expected = reference.dequantize(packed, absmax, quant_type, blocksize, (blocks, blocksize), dtype)
    return torch.equal(got.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
