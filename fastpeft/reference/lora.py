"""The LoRA linear, written the way the paper states it.

    y = x w^T + scale * (drop(x) a^T) b^T + bias,    drop(x) = keep * x / (1 - p)

Shapes:  x [..., K], w [N, K], a [R, K], b [N, R], bias [N] or None, keep [..., K] or None -> y [..., N]
Dtypes:  any floating dtype up to float64; everything is promoted by PyTorch's own rules
Source:  Hu et al. 2021, arXiv:2106.09685, section 4.1
"""

import torch


def lora_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x w^T + scale * (drop(x) a^T) b^T + bias, with drop given by the boolean mask `keep` (None keeps all).

    dropout_p is the probability that `keep` was drawn with: kept elements are divided by 1 - dropout_p.
    """
    y = x @ w.mT
    dropped = x if keep is None else x * keep / (1.0 - dropout_p)
    y = y + scale * ((dropped @ a.mT) @ b.mT)
    return y if bias is None else y + bias


def lora_embedding(
    ids: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float = 1.0
) -> torch.Tensor:
    """y = w[ids] + scale * (a^T)[ids] b^T.

    Shapes:  ids [...] integers below V, w [V, D], a [R, V], b [D, R] -> y [..., D]
    """
    return w[ids] + scale * (a.mT[ids] @ b.mT)
