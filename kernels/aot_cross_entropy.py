"""The cross-entropy kernel for ahead-of-time compilation: a recording of its launcher, as in aot_cases.py.

A chunk of 256 rows of vocabularies of Llama 3 and Gemma 2 (capped), one of an odd size, and everything at once.
"""

import torch

from fastpeft.kernels import cross_entropy
from fastpeft.kernels.aot_cases import BF16, FP32, AotCase, case_of, target_for
from fastpeft.kernels.launch import record_launches

_PLAIN = {"softcap": None, "logit_scale": 1.0, "label_smoothing": 0.0, "z_loss": 0.0}
_ALL = {"softcap": 30.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-4}
# name: dtype of the logits, dtype of their gradient or None, V, with bias and weights, terms
_SHIPPED = {
    "bf16": (BF16, BF16, 128256, False, _PLAIN),
    "fp32-to-bf16": (FP32, BF16, 128256, False, _PLAIN),
    "fp32-loss-only": (FP32, None, 128256, False, _PLAIN),
    "fp32-to-bf16-softcap": (FP32, BF16, 256000, False, _PLAIN | {"softcap": 30.0}),
    "bf16-odd": (BF16, BF16, 50257, False, _PLAIN),
    "fp32-all": (FP32, FP32, 128256, True, _ALL),
}


def aot_cases(arch: str) -> list[AotCase]:
    """The cross-entropy kernel's compilations for `arch`."""
    target = target_for(arch)
    cases = []
    for name, (dtype, grad_dtype, v, everything, terms) in _SHIPPED.items():

        def empty(*shape, dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        logits, labels = empty(256, cross_entropy.padded(v), dtype=dtype)[:, :v], empty(256, dtype=torch.int64)
        out = None if grad_dtype is None else logits if grad_dtype == dtype else empty(256, v, dtype=grad_dtype)
        optional = {"factor": empty((), dtype=FP32)}
        if everything:
            optional |= {"bias": empty(v, dtype=FP32), "weights": empty(256, dtype=FP32)}
        with record_launches(target) as launches:
            cross_entropy.cross_entropy(logits, labels, out=out, ignore_index=-100, **optional, **terms)
        cases.append(case_of(f"cross_entropy-{name}", launches[0]))
    return cases
