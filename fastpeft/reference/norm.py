"""RMSNorm and LayerNorm, written the way the papers state them.

    rms_norm:    y = x / sqrt(mean(x^2) + eps) * (weight + offset)
    layer_norm:  y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias        means over the last axis

Shapes:  x [..., K], weight, bias [K] or None -> y [..., K]
Dtypes:  any floating dtype up to float64; everything is promoted by PyTorch's own rules
Source:  Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; Ba et al. 2016, arXiv:1607.06450, equation 4
"""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, *, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Rows of x brought to a root mean square of one, then scaled by column."""
    y = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * (weight + offset)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, *, eps: float) -> torch.Tensor:
    """Rows of x brought to a mean of zero and a variance of one, then scaled and shifted by column."""
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
