"""A batch whose rows use different adapters, written row by row.

y_i = x_i w^T + bias + scale_l (x_i a_l^T) b_l^T,    l = row_adapters[i]; without an adapter where l is -1
"""

from collections.abc import Sequence

import torch

from fastpeft.reference.lora import lora_linear


def lora_linear_rows(
    x: torch.Tensor,
    w: torch.Tensor,
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor, float]],
    row_adapters: Sequence[int],
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [B, ..., N] of x [B, ..., K]: item i of the batch through adapter row_adapters[i], (a, b, scale), or none for -1."""
    outputs = []
    for item, adapter in zip(x, row_adapters, strict=True):
        if adapter < 0:
            y = item @ w.mT
            outputs.append(y if bias is None else y + bias)
        else:
            a, b, scale = adapters[adapter]
            outputs.append(lora_linear(item, w, a, b, bias, scale=scale))
    return torch.stack(outputs) if outputs else x.new_empty(*x.shape[:-1], w.shape[0])
