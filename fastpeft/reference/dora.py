"""The DoRA linear, written the way the paper states it.

    V = w + scale * b a,    norm = ||V||_row (not differentiated),    gain = magnitude / max(norm, eps)
    y = (x - x_d) w^T + gain * (x_d V^T) + bias,    x_d = keep * x / (1 - p)

Without dropout x_d = x and y = gain * (x V^T) + bias. With it the dropped input also replaces x in the part that is scaled: so
it is in PEFT, and so it is here.

Shapes:  x [..., K], w [N, K], a [R, K], b [N, R], magnitude [N], bias [N] or None, keep [..., K] or None -> y [..., N]
Dtypes:  any floating dtype up to float64; everything is promoted by PyTorch's own rules
Source:  Liu et al. 2024, arXiv:2402.09353, equations 5 and 11
"""

import torch


def dora_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    eps: float = 1e-12,
) -> torch.Tensor:
    """y = (x - x_d) w^T + gain * (x_d (w + scale b a)^T) + bias."""
    v = w + scale * (b @ a)
    gain = magnitude / v.detach().norm(dim=1).clamp_min(eps)
    dropped = x if keep is None else x * keep / (1.0 - dropout_p)
    y = gain * (dropped @ v.mT)
    if keep is not None:
        y = y + (x - dropped) @ w.mT
    return y if bias is None else y + bias
