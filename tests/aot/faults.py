"""Shipped kernels compiled with a fault on purpose, which `static --check --cases tests.aot.faults` must find."""

import dataclasses

from fastpeft.kernels import aot_cases as shipped
from fastpeft.kernels.aot_cases import AotCase

SPILL, NARROW = "lora_down-bf16-r16-large", "lora_down-fp32-r16-large"
_ABSURD = {"BLOCK_M": 512, "BLOCK_K": 64}


def aot_cases(arch: str) -> list[AotCase]:
    """A tile that one warp has no registers for, and float32 pointers that promise no alignment: loads of 4 bytes."""
    cases = {case.name: case for case in shipped.aot_cases(arch)}
    spilling = dataclasses.replace(cases[SPILL], num_warps=1, constexprs=cases[SPILL].constexprs | _ABSURD)
    return [spilling, dataclasses.replace(cases[NARROW], divisible=())]
