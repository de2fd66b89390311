"""Calls of a few rows on a CPU, decoding above all: there a module's own code is faster than ours, and is what runs.

    x [..., K] of at most ROWS rows, no gradient, dense weights, impl="auto", not under torch.compile

What our ops save grows with the rows; their checks in Python do not: one token through four layers of SmolLM2-135M's shape with
PEFT's LoRA takes 8.2 ms untouched, 11.1 by our modules, and 8.8 by this (Zen 4, one thread, float32). A call that is left to the
module for this reason alone is what the untouched model does, so the report does not count it.
"""

import torch

from fastpeft.ops.tracing import traced

ROWS = 16


def few_rows(impl: str, x: torch.Tensor) -> bool:
    """Whether this call is left to the module's own forward, if its weights are dense."""
    return (
        impl == "auto"
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dim() > 0
        and x.numel() <= ROWS * x.shape[-1]
        and not traced(x)
    )
