"""Cross-entropy of a linear head's logits, written as it is defined.

    u = logit_scale (x w^T + bias),   z = softcap tanh(u / softcap), or u without a softcap
    lse = log sum_v exp z_v
    loss = lse - (1 - e) z_label - e / V sum_v z_v + z_loss lse^2,   0 where label == ignore_index;   e: label_smoothing

Shapes:  x [M, K], w [V, K], bias [V] or None, labels [M] integers -> loss [M]
Dtypes:  any floating dtype up to float64; everything is promoted by PyTorch's own rules
Source:  Szegedy et al. 2016, arXiv:1512.00567, section 7 (smoothing); Gemma 2, arXiv:2408.00118 (softcap);
         PaLM, arXiv:2204.02311, section 5 (z-loss)
"""

import torch


def linear_cross_entropy(
    x: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The loss of every row; rows whose label is ignored are cut out before they can give a NaN."""
    kept = labels != ignore_index
    z = x @ w.t() if bias is None else x @ w.t() + bias
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = torch.where(kept[:, None], z, torch.zeros((), dtype=z.dtype, device=z.device))
    lse = torch.logsumexp(z, dim=-1)
    at_label = z.gather(-1, torch.where(kept, labels, 0).long()[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * at_label - label_smoothing * z.mean(-1) + z_loss * lse.square()
    return torch.where(kept, loss, torch.zeros((), dtype=loss.dtype, device=loss.device))
