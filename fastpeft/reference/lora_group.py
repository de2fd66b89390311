"""Several LoRA linears of one input, written one after another.

    y_i = x w_i^T + scale_i * (drop_i(x) a_i^T) b_i^T + bias_i        without the middle term where a_i and b_i are None

Shapes:  x [..., K], w_i [N_i, K], a_i [R_i, K], b_i [N_i, R_i], bias_i [N_i] or None -> y_i [..., N_i]
Dtypes:  any floating dtype up to float64; everything is promoted by PyTorch's own rules
"""

from collections.abc import Sequence

import torch

from fastpeft.reference.lora import lora_linear


def lora_linear_group(
    x: torch.Tensor,
    members: Sequence[tuple],
    keeps: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, ...]:
    """members: (w, a, b, bias, scale, dropout_p, ...) of each; keeps: their boolean masks [..., K], None keeps all."""
    outputs = []
    for member, keep in zip(members, keeps or [None] * len(members), strict=True):
        w, a, b, bias, scale, dropout_p, *_ = member
        if a is None:
            y = x @ w.mT
            outputs.append(y if bias is None else y + bias)
        else:
            outputs.append(lora_linear(x, w, a, b, bias, scale=scale, dropout_p=dropout_p, keep=keep))
    return tuple(outputs)
