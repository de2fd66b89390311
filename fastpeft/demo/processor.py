"""Whether bfloat16 is worth computing in on this machine."""

import time

import torch
import torch.nn.functional as F


def multiplies_bfloat16() -> bool:
    """True where bfloat16 products are native: on most GPUs, and on CPUs with AMX or AVX512-BF16.

    There they take less time than float32 products, elsewhere several times more: one timing tells them apart.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """Seconds of a [512, 576] x [576, 576] product, the best of ten."""
    x, w = torch.zeros(512, 576, dtype=dtype), torch.zeros(576, 576, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        F.linear(x, w)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
