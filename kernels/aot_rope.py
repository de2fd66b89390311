"""The rotary kernel for ahead-of-time compilation: a recording of its launcher, as in aot_cases.py.

2 x 4096 tokens of 32 query and 8 key heads of 128 columns in both layouts, a partial rotation, and one token of 64 sequences.
"""

import torch

from fastpeft.kernels import rope
from fastpeft.kernels.aot_cases import BF16, FP32, AotCase, case_of, target_for
from fastpeft.kernels.launch import record_launches

# name: dtype, B, S, H, H_kv, D, R / 2, interleaved, with positions
_SHIPPED = {
    "bf16-half-split": (BF16, 2, 4096, 32, 8, 128, 64, False, False),
    "bf16-interleaved": (BF16, 2, 4096, 32, 8, 128, 64, True, False),
    "bf16-partial": (BF16, 2, 4096, 32, 8, 128, 32, False, True),
    "bf16-decode": (BF16, 64, 1, 32, 8, 128, 64, False, True),
    "fp32-half-split": (FP32, 2, 4096, 32, 8, 64, 32, False, False),
}


def aot_cases(arch: str) -> list[AotCase]:
    """The rotary kernel's compilations for `arch`."""
    target = target_for(arch)
    cases = []
    for name, (dtype, b, s, h, h_kv, d, half, interleaved, with_positions) in _SHIPPED.items():

        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        positions = empty(b, s, dtype=torch.int64) if with_positions else None
        options = {"positions": positions, "offset": 0, "interleaved": interleaved, "inverse": False}
        table = empty(8192, half, dtype=FP32)
        with record_launches(target) as launches:
            rope.rotate(empty(b, s, h, d), empty(b, s, h_kv, d), table, table, **options)
        cases.append(case_of(f"rope-{name}", launches[0]))
    return cases
