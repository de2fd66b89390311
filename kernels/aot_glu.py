"""The GLU kernels for ahead-of-time compilation: a recording of their launchers, as in aot_cases.py.

8192 rows of Llama's 14336 columns, the halves of Phi-3's packed 2 x 8192, and a width that no tile divides.
"""

import torch

from fastpeft.kernels import glu
from fastpeft.kernels.aot_cases import BF16, FP16, FP32, AotCase, case_of, target_for
from fastpeft.kernels.launch import record_launches

# name: dtype, N, activation, packed
_SHIPPED = {
    "bf16-silu": (BF16, 14336, "silu", False),
    "bf16-silu-packed": (BF16, 8192, "silu", True),
    "bf16-gelu": (BF16, 14336, "gelu", False),
    "bf16-gelu-tanh": (BF16, 14336, "gelu_tanh", False),
    "fp16-silu-odd": (FP16, 1552, "silu", False),
    "fp32-silu": (FP32, 14336, "silu", False),
    "fp32-gelu": (FP32, 14336, "gelu", False),
}
_M = 8192


def aot_cases(arch: str) -> list[AotCase]:
    """The kernels of forward, backward, and backward with h again, for `arch`."""
    target = target_for(arch)
    cases = []
    for name, (dtype, n, activation, packed) in _SHIPPED.items():
        both = torch.empty(_M, 2 * n, dtype=dtype, device="meta")
        gate, up = (both[:, :n], both[:, n:]) if packed else (both.view(-1, n)[:_M], both.view(-1, n)[_M:])
        dh = torch.empty(_M, n, dtype=dtype, device="meta")
        with record_launches(target) as launches:
            glu.glu(gate, up, activation)
            glu.glu_grad(dh, gate, up, activation)
            glu.glu_grad(dh, gate, up, activation, with_h=True)
        for kind, launch in zip(("glu", "glu_grad", "glu_grad_h"), launches, strict=True):
            cases.append(case_of(f"{kind}-{name}", launch))
    return cases
