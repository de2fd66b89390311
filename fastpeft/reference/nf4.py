"""4-bit storage of a frozen weight (NF4, FP4), written the way bitsandbytes defines it.

    absmax(g) = max |w| over block g of G consecutive elements,   i counts the elements of w [N, K] row by row
    q(i)      = rank of the code nearest to w(i) / absmax(i // G), a tie going to the lower code
    w^(i)     = codes[q(i)] * absmax(i // G) in float32, rounded once to the wanted dtype

Blocks run across the ends of rows and the last one may be short. A byte holds elements 2j (high four bits) and 2j + 1.
Double quantisation stores absmax in 8 bits: offset = mean(absmax), and absmax - offset by blocks of 256 over a fixed
table of 256 values that are dense near zero (`dynamic_table`).

Shapes:  w [N, K]; packed uint8 [ceil(N K / 2)], absmax [ceil(N K / G)]; nested absmax [ceil(blocks / 256)]
Dtypes:  w float32, float16 or bfloat16; arithmetic in float32
Source:  Dettmers et al. 2023, arXiv:2305.14314, section 3; Dettmers et al. 2021, arXiv:2110.02861 (the 8-bit table)
"""

import torch

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A sign, two bits of exponent, one of mantissa, by bit pattern; divided by the largest, in float32.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCKSIZE = 256
SMALLEST_ABSMAX = 1e-38


def codes(quant_type: str) -> torch.Tensor:
    """The 16 values, float32 [16], by code."""
    if quant_type == "nf4":
        return torch.tensor(NF4, dtype=torch.float32)
    magnitudes = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32) / max(_FP4_MAGNITUDES)
    return torch.cat([magnitudes, 0.0 - magnitudes])


def ranks(quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(bounds float32 [15], order uint8 [16]): midpoints of the ascending values, and the code of each rank."""
    values, order = codes(quant_type).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


def quantize(w: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, absmax). Whole blocks are multiplied by the reciprocal of absmax; the short last one is divided by it."""
    bounds, order = ranks(quant_type)
    flat = w.reshape(-1).float()
    whole = flat.numel() // blocksize * blocksize
    blocks = flat[:whole].view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).view(-1)
    if whole < flat.numel():
        last = flat[whole:].abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, flat[whole:] / last])
    if flat.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    code = order[torch.bucketize(scaled, bounds)]
    return code[0::2] << 4 | code[1::2], absmax


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """w^ [N, K] in `dtype`, from float32 absmax."""
    elements = shape[0] * shape[1]
    code = torch.stack([packed >> 4, packed & 15], 1).view(-1)[:elements]
    values = codes(quant_type).to(packed.device)[code.long()]
    block = torch.arange(elements, device=packed.device) // blocksize
    return (values * absmax[block]).view(shape).to(dtype)


def dynamic_table() -> torch.Tensor:
    """The 256 ascending float32 values of an 8-bit absmax: 0, 1, and +-10^(i-6) times 2^i midpoints of [0.1, 1], i = 0..6."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [blocks], scales float32 [ceil(blocks / 256)], offset): absmax in 8 bits, nearest value of the table."""
    table = dynamic_table().to(absmax.device)
    offset = absmax.mean()
    centred = absmax - offset
    padding = -centred.numel() % NESTED_BLOCKSIZE
    blocks = torch.nn.functional.pad(centred, (0, padding)).view(-1, NESTED_BLOCKSIZE)
    scales = blocks.abs().amax(1)
    scaled = blocks * (1.0 / scales.clamp(min=SMALLEST_ABSMAX))[:, None]
    code = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return code.view(-1)[: absmax.numel()].clone(), scales, offset


def dequantize_absmax(
    code: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """absmax float32 [blocks]: table[code] * scale, then + offset, each rounded to float32."""
    block = torch.arange(code.numel(), device=code.device) // NESTED_BLOCKSIZE
    return table[code.long()] * scales[block] + offset
