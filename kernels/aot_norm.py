"""The norms for ahead-of-time compilation: a recording of their launchers on meta tensors, as in aot_cases.py.

8192 rows of a decoder's width, heads of 128 columns (the norms of Qwen3's queries and keys), an encoder's LayerNorm, and rows
that are looped over.
"""

from collections.abc import Iterator

import torch

from fastpeft.kernels import norm
from fastpeft.kernels.aot_cases import BF16, FP32, AotCase, case_of, target_for
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.tiling import Target

# name: dtype of x, dtype of weight and bias, M, K, centred, with residual, weight and bias train
_SHIPPED = {
    "rms-bf16": (BF16, BF16, 8192, 4096, False, False, False),
    "rms-bf16-residual-trains": (BF16, FP32, 8192, 4096, False, True, True),
    "rms-bf16-8192-trains": (BF16, BF16, 8192, 8192, False, True, True),
    "rms-bf16-16384": (BF16, BF16, 8192, 16384, False, False, True),
    "rms-bf16-32768": (BF16, BF16, 1024, 32768, False, True, False),
    "rms-bf16-heads-trains": (BF16, BF16, 8192 * 32, 128, False, False, True),
    "rms-fp32-trains": (FP32, FP32, 8192, 4096, False, False, True),
    "layer-bf16-768-trains": (BF16, BF16, 8192, 768, True, False, True),
    "layer-bf16-8192-trains": (BF16, FP32, 8192, 8192, True, True, True),
    "layer-fp32-32768-trains": (FP32, FP32, 1024, 32768, True, True, True),
}


def aot_cases(arch: str) -> list[AotCase]:
    """The kernels of norm.py and norm_wide.py for `arch`, each compilation once."""
    cases: dict[tuple, AotCase] = {}
    for name, launch in _launches(target_for(arch)):
        case = case_of(name, launch)
        compiled = (case.kernel, str((case.signature, case.constexprs, case.divisible)), case.num_warps)
        cases.setdefault(compiled, case)
    return list(cases.values())


def _launches(target: Target) -> Iterator[tuple[str, Launch]]:
    for name, (dtype, weight_dtype, m, k, centred, with_residual, trains) in _SHIPPED.items():

        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        x, residual = empty(m, k), empty(m, k) if with_residual else None
        w, rstd = empty(k, dtype=weight_dtype), empty(m, dtype=FP32)
        bias, mean = (w, rstd) if centred else (None, None)
        options = {"eps": 1e-6, "offset": 0.0}
        needs = (True, trains, trains and centred)
        with record_launches(target) as launches:
            norm.norm_forward(x, residual, w, bias, centred=centred, dtype=dtype, **options)
            norm.norm_backward(x, residual, x, w, mean, rstd, offset=0.0, bias_dtype=weight_dtype, needs=needs)
        for launch in launches:
            kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            if kernel != "sum_parts":  # the LoRA kernels' cases have it
                yield f"{kernel}-{name}", launch
