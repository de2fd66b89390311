"""What the attention kernels share: tiles of scores with everything that enters them, and which tiles there are.

    s(i, j) = cap(scale * q_i k_j) + bias(i, j) + distances(d) - slope |d|,   d = j - beside(i)
    seen(i, j):  low(i) <= j < high(i)

`beside` is the key that a query stands beside: i + Sk - Sq, or the same within one packed sequence. Causality, windows and
packed sequences are all one interval of keys per query, and the same interval of queries per key; tiles outside of it are
never visited, tiles inside of it take no mask.

Scores are kept in units in which `factor` turns them into base 2: without a cap those are q k, so that scale and the change of
base cost one multiply-add, and bias enters as the accumulator of the product. Rows of a bias past the end repeat the last one
instead of being masked. Measured on sm_90 at D = 128 (instructions of one 128x64 tile besides the products): 265 without a
bias and 353 with it, against 649 for scale * s + bias after the product.

An argument that is None switches its term off at compile time.
"""

import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile

LOG2E = tl.constexpr(1.4426950408889634)
# Elements that a bias's rows are aligned to: with other strides sm_90 spills 480 registers.
BIAS_ALIGNMENT = tl.constexpr(16)
# Below this 2 sigmoid(2x) - 1 loses digits to cancellation; the series is off by 6e-8 of its value there.
_SERIES_UP_TO = tl.constexpr(0.2)


@triton.jit
def tanh(x):
    """tanh in float32, without libdevice."""
    square = x * x
    series = x + x * square * (-0.33333334 + square * (0.13333334 + square * -0.053968254))
    return tl.where(tl.abs(x) < _SERIES_UP_TO, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def load_rows(
    ptr, first, stride, end, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """[ROWS, BLOCK_D]: rows first + [0, ROWS) of a matrix [end, D]; with MASKED those past its end repeat the last one.

    Their scores get no weight and their results are not stored; a mask would cost registers.
    """
    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    if MASKED:
        offs_r = tl.minimum(offs_r, end - 1 - first)
    ptrs = ptr + tl.cast(first, tl.int64) * stride + offs_r[:, None] * stride + offs_d[None, :]
    if D < BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(
    ptr, tile, first, stride, end, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Store rows first + [0, ROWS), those that exist, in the matrix's dtype."""
    offs_r = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(first, tl.int64) * stride + offs_r[:, None] * stride + offs_d[None, :]
    tile = tile.to(ptr.dtype.element_ty)
    if MASKED or D < BLOCK_D:
        tl.store(ptrs, tile, mask=(offs_r < end - first)[:, None] & (offs_d < D)[None, :])
    else:
        tl.store(ptrs, tile)


@triton.jit
def rope_of(b, cos_ptr, sin_ptr, stride_rb, stride_rm):
    """What `load_turned` takes for batch b; cos_ptr and sin_ptr are None where nothing is to be rotated."""
    if cos_ptr is not None:
        cos_ptr += b * stride_rb
        sin_ptr += b * stride_rb
    return cos_ptr, sin_ptr, stride_rm


@triton.jit
def rope_from(rope, first):
    """`rope` for a pointer that stands at row `first` already."""
    cos_ptr, sin_ptr, stride_rm = rope
    if cos_ptr is not None:
        cos_ptr += tl.cast(first, tl.int64) * stride_rm
        sin_ptr += tl.cast(first, tl.int64) * stride_rm
    return cos_ptr, sin_ptr, stride_rm


@triton.jit
def load_turned(
    ptr, first, stride, end, rope, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """`load_rows` of q or k, rotated on the way: D is BLOCK_D then, pairs are (d, d + D / 2).

    Each element comes with its partner, a second time: from the cache. Halves that are loaded once and joined in registers cost
    sm_80 up to 7289 spills at D = 128, and a share of 0.24 of the tensor pipe where this has 0.67.
    In a loop over keys a tile is rotated once a tile of queries. Shares of the tensor pipe (fwd, dq, dkdv; D 64, then 128)
    without and with it, compiled: sm_90 0.97 1 1, 1 1 1 and 0.60 0.98 0.97, 0.70 1 1; sm_80 1 1 1, 0.88 0.88 0.76 and
    0.97 0.95 1, 0.68 0.64 0.67. So it is for who lacks memory for rotated copies; else rope.py's kernel goes before.
    """
    cos_ptr, sin_ptr, stride_rm = rope
    if cos_ptr is None:
        x = load_rows(ptr, first, stride, end, D, ROWS, BLOCK_D, MASKED)
    else:
        HALF: tl.constexpr = BLOCK_D // 2
        offs_r = tl.arange(0, ROWS)
        offs_d = tl.arange(0, BLOCK_D)
        if MASKED:
            offs_r = tl.minimum(offs_r, end - 1 - first)
        base = tl.cast(first, tl.int64)
        row = ptr + base * stride + offs_r[:, None] * stride
        at = base * stride_rm + offs_r[:, None] * stride_rm + (offs_d % HALF)[None, :]
        x = tl.load(row + offs_d[None, :]).to(tl.float32)
        y = tl.load(row + ((offs_d + HALF) % BLOCK_D)[None, :]).to(tl.float32)
        cos = tl.load(cos_ptr + at).to(tl.float32)
        sin = tl.load(sin_ptr + at).to(tl.float32)
        sin = tl.where((offs_d < HALF)[None, :], -sin, sin)
        x = (x * cos + y * sin).to(ptr.dtype.element_ty)
    return x


@triton.jit
def turned_back(tile, first, end, rope, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """The gradient [ROWS, BLOCK_D] of what `load_turned` read, from that of what it gave."""
    cos_ptr, sin_ptr, stride_rm = rope
    if cos_ptr is not None:
        HALF: tl.constexpr = BLOCK_D // 2
        cos = load_rows(cos_ptr, first, stride_rm, end, HALF, ROWS, HALF, MASKED).to(tl.float32)
        sin = load_rows(sin_ptr, first, stride_rm, end, HALF, ROWS, HALF, MASKED).to(tl.float32)
        y1, y2 = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))
        tile = _halves_joined(y1 * cos + y2 * sin, y2 * cos - y1 * sin, ROWS, BLOCK_D)
    return tile


@triton.jit
def _halves_joined(x1, x2, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(x1, x2), (0, 2, 1)), (ROWS, BLOCK_D))


@triton.jit
def query_interval(offs_m, rows_ptr, sq, sk, left, right):
    """(beside, low, high) [BLOCK_M]: the key beside each query, and the keys that it sees. Rows past the end: the last one's."""
    offs_m = tl.minimum(offs_m, sq - 1)
    if rows_ptr is not None:
        return tl.load(rows_ptr + offs_m), tl.load(rows_ptr + sq + offs_m), tl.load(rows_ptr + 2 * sq + offs_m)
    beside = offs_m + (sk - sq)
    low, high = beside * 0, beside * 0 + sk
    if left is not None:
        low = tl.maximum(beside - left, 0)
    if right is not None:
        high = tl.minimum(beside + right + 1, sk)
    return beside, low, high


@triton.jit
def _clamped(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def tile_range(first, last, before, after, length, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    """(begin, full_begin, full_end, end), multiples of BLOCK but for the end: what a tile of the other side has to visit.

    The tile's elements stand beside first ... last, and each sees `before` elements before that and `after` after it. All of
    them see all of [full_begin, full_end). RAGGED: the last elements may fill a tile partly; else that counts as full.
    """
    begin, full_begin = length * 0, length * 0
    end, full_end = length, length
    if before is not None:
        begin = _clamped(first - before, 0, length)
        full_begin = _clamped(last - before, 0, length)
    if after is not None:
        end = _clamped(last + after + 1, 0, length)
        full_end = _clamped(first + after + 1, 0, length)
    return _in_tiles(begin, full_begin, full_end, end, length, BLOCK, RAGGED)


@triton.jit
def _in_tiles(begin, full_begin, full_end, end, length, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    begin = begin // BLOCK * BLOCK
    full_begin = (full_begin + BLOCK - 1) // BLOCK * BLOCK
    if not RAGGED:
        full_end = tl.where(full_end == length, (length + BLOCK - 1) // BLOCK * BLOCK, full_end)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def interval_range(low, high, length, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    """`tile_range` of the intervals [low, high) of a tile's elements; an empty tile has begin >= end."""
    return _in_tiles(tl.min(low, 0), tl.max(low, 0), tl.min(high, 0), tl.max(high, 0), length, BLOCK, RAGGED)


@triton.jit
def within_keys(begin, full_begin, full_end, end, valid_ptr, BLOCK: tl.constexpr):
    """A tile range of keys without the tiles before the first and behind the last key that is no padding."""
    if valid_ptr is not None:
        first = tl.load(valid_ptr) // BLOCK * BLOCK
        last = (tl.load(valid_ptr + 1) + BLOCK - 1) // BLOCK * BLOCK
        begin, full_begin = tl.maximum(begin, first), tl.maximum(full_begin, first)
        full_end = tl.maximum(tl.minimum(full_end, last), full_begin)
        end = tl.minimum(end, last)
    return begin, full_begin, full_end, end


@triton.jit
def _bias_tile(bias_ptr, stride_bm, first_m, offs_n, sq, sk, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    rows = tl.minimum(tl.arange(0, BLOCK_M), sq - 1 - first_m)
    ptrs = bias_ptr + tl.cast(first_m, tl.int64) * stride_bm + (rows[:, None] * stride_bm + offs_n[None, :])
    if MASKED:  # rows have room up to a multiple of 16, so that loads stay wide; what lies there is not used
        columns = (sk + (BIAS_ALIGNMENT - 1)) // BIAS_ALIGNMENT * BIAS_ALIGNMENT
        return tl.load(ptrs, mask=(offs_n < columns)[None, :], other=0.0).to(tl.float32)
    return tl.load(ptrs).to(tl.float32)


@triton.jit
def terms_of(
    b,
    h,
    bias_ptr,
    distances_ptr,
    slopes_ptr,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_sb,
    max_distance,
    TERMS: tl.constexpr,
):
    """What `score_tile` adds for head (b, h); TERMS: which of (bias, distances, slopes) there are, the others are zeros."""
    bias, distances, slope = 0, 0, 0.0
    if TERMS[0]:
        bias = bias_ptr + b * stride_bb + h * stride_bh
    if TERMS[1]:
        distances = distances_ptr + h * (2 * max_distance + 1) + max_distance
    if TERMS[2]:
        slope = tl.load(slopes_ptr + b * stride_sb + h)
    return bias, stride_bm, distances, max_distance, slope


@triton.jit
def _distance_terms(distances_ptr, max_distance, slope, distance, TERMS: tl.constexpr):
    if TERMS[1]:
        term = tl.load(distances_ptr + _clamped(distance, -max_distance, max_distance))
        if TERMS[2]:
            term = term - slope * tl.abs(distance).to(tl.float32)
    else:
        term = -slope * tl.abs(distance).to(tl.float32)
    return term


@triton.jit
def _added(
    terms,
    beside,
    first_m,
    offs_n,
    sq,
    sk,
    BLOCK_M: tl.constexpr,
    TERMS: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """What is added to the scores, float32: [BLOCK_M, BLOCK_N], or its transpose."""
    bias_ptr, stride_bm, distances_ptr, max_distance, slope = terms
    if TERMS[1] or TERMS[2]:
        if TRANSPOSED:
            term = _distance_terms(distances_ptr, max_distance, slope, offs_n[:, None] - beside[None, :], TERMS)
        else:
            term = _distance_terms(distances_ptr, max_distance, slope, offs_n[None, :] - beside[:, None], TERMS)
        if TERMS[0]:
            bias = _bias_tile(bias_ptr, stride_bm, first_m, offs_n, sq, sk, BLOCK_M, MASKED)
            term = term + (tl.trans(bias) if TRANSPOSED else bias)
    else:
        term = _bias_tile(bias_ptr, stride_bm, first_m, offs_n, sq, sk, BLOCK_M, MASKED)
        if TRANSPOSED:
            term = tl.trans(term)
    return term


@triton.jit
def score_tile(
    a,
    b,
    terms,
    scale,
    softcap,
    beside,
    first_m,
    offs_n,
    sq,
    sk,
    TERMS: tl.constexpr,
    MASKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(s, slope of the cap): a b^T and all that enters it, in units of 1 / factor; a is q, b is k, exchanged if TRANSPOSED.

    slope of the cap: tanh of the capped score, whose square the backward wants; s itself without a cap.
    """
    BLOCK_M: tl.constexpr = b.shape[0] if TRANSPOSED else a.shape[0]
    if softcap is None:
        if TERMS[0] or TERMS[1] or TERMS[2]:
            added = _added(terms, beside, first_m, offs_n, sq, sk, BLOCK_M, TERMS, MASKED, TRANSPOSED) * (1.0 / scale)
            s = tl.dot(a, tl.trans(b), added, input_precision=PRECISION)
        else:
            s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        capped = s
    else:
        capped = tanh(tl.dot(a, tl.trans(b), input_precision=PRECISION) * (scale / softcap))
        s = softcap * capped
        if TERMS[0] or TERMS[1] or TERMS[2]:
            s += _added(terms, beside, first_m, offs_n, sq, sk, BLOCK_M, TERMS, MASKED, TRANSPOSED)
    return s, capped


@triton.jit
def factor_of(scale, softcap):
    """What turns a score of `score_tile` into base 2."""
    if softcap is None:
        factor = scale * LOG2E
    else:
        factor = scale * 0.0 + LOG2E
    return factor


@triton.jit
def kept(seed, row_of_head, offs_m, first_n, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] booleans, True where dropout keeps: row i of head (b, h) is row (b H + h) Sq + i of dropout.py."""
    return keep_tile(seed, row_of_head + offs_m, first_n, threshold, BLOCK_M, BLOCK_N)
