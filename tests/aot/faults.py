"""A shipped kernel compiled with a fault on purpose, which `static --check --cases tests.aot.faults` must find."""

import dataclasses

from fastpeft.kernels import aot_cases as shipped
from fastpeft.kernels.aot_cases import AotCase

KERNEL = "lora_down-bf16-r16-large"
SPILL, NARROW = f"{KERNEL}-one-warp", f"{KERNEL}-unaligned"


def aot_cases(arch: str) -> list[AotCase]:
    """A tile that one warp has no registers for, and a hot loop whose pointers promise no alignment."""
    (case,) = [case for case in shipped.aot_cases(arch) if case.name == KERNEL]
    return [
        dataclasses.replace(case, name=SPILL, num_warps=1, limits={"redundancy": 2.0}),
        dataclasses.replace(case, name=NARROW, divisible=(), limits={"redundancy": 2.0}),
    ]
