"""Quantising a weight to NF4: the packed bytes, which must be bitsandbytes'.

Bytes the weight once, half a byte per element and one float32 per block once
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from benchmarks.case import DTYPE_BYTES, SHORT, Absent, Op, Work
from fastpeft.ops.nf4 import quantize_4bit
from fastpeft.reference import nf4 as reference

BLOCK = 64


@dataclass(frozen=True)
class QuantizeCase:
    """A square weight."""

    size: int
    dtype: str = "bfloat16"
    backward: bool = False

    def __str__(self) -> str:
        return f"nf4 {self.size}x{self.size} {SHORT[self.dtype]}"

    def flops(self) -> float:
        return 16.0 * self.size**2  # a product and 15 comparisons per element

    def bytes(self) -> float:
        return self.size**2 * (DTYPE_BYTES[self.dtype] + 0.5 + 4 / BLOCK)


CASES = tuple(QuantizeCase(2048, dtype) for dtype in ("bfloat16", "float32"))
QUICK = (QuantizeCase(1024),)


def inputs(case: QuantizeCase, device: torch.device) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(case.size, case.size, generator=generator)
    return SimpleNamespace(w=w.to(device, getattr(torch, case.dtype)))


def with_fastpeft(given: SimpleNamespace) -> Work:
    return Work(lambda: quantize_4bit(given.w, "nf4").packed, (), [given.w])


def with_bitsandbytes(given: SimpleNamespace) -> Work:
    try:
        from bitsandbytes.functional import quantize_4bit as theirs
    except ImportError as error:
        raise Absent(str(error)) from error
    return Work(lambda: theirs(given.w, quant_type="nf4", blocksize=BLOCK)[0].view(-1), (), [given.w])


def exact(given: SimpleNamespace, dy: torch.Tensor | None) -> list[torch.Tensor]:
    return [reference.quantize(given.w, "nf4", BLOCK)[0].view(-1).double()]


OP = Op(
    "quantize",
    "Quantising to NF4",
    CASES,
    QUICK,
    baseline="bitsandbytes",
    inputs=inputs,
    providers={"bitsandbytes": with_bitsandbytes, "fastpeft": with_fastpeft},
    exact=exact,
)
