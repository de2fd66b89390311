"""One tensor out of the same tensor of several adapters, by the published ways to combine what was learned.

    sum             sum of w_i t_i                                                              (task arithmetic)
    magnitude       the same after keeping the `density` largest values of each t_i
    ties            keep the largest; of each element only the tensors that have the elected sign, averaged
    dare_sum        the same as sum after dropping values at random and dividing the rest by `density`
    dare_ties       drop at random, then elect and average as ties does

Shapes:  tensors alike, any; weights [number of tensors]
Source:  Ilharco et al. 2023, arXiv:2212.04089; Yadav et al. 2023, arXiv:2306.01708 (TIES);
         Yu et al. 2024, arXiv:2311.03099 (DARE)
"""

from typing import Literal

import torch

MajoritySign = Literal["total", "frequency"]
METHODS = ("sum", "magnitude", "ties", "dare_sum", "dare_ties")


def combine(
    method: str,
    tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
) -> torch.Tensor:
    """The combination named by `method`. The dare methods draw from the global generator, one tensor after another."""
    if method in ("magnitude", "ties"):
        tensors = [keep_largest(tensor, density) for tensor in tensors]
    elif method in ("dare_sum", "dare_ties"):
        tensors = [keep_random(tensor, density) for tensor in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * weights.view(-1, *[1] * (stacked.dim() - 1))
    if method not in ("ties", "dare_ties"):
        return weighted.sum(dim=0)
    agrees = has_elected_sign(stacked, majority_sign_method)
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)


def keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The tensor with zeros in place of all but the int(density n) values of largest magnitude."""
    if density >= 1:
        return tensor
    kept = tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[kept] = 1
    return tensor * mask.view(tensor.shape)


def keep_random(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Every value kept with probability `density` and divided by it, so that its mean stays."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def has_elected_sign(stacked: torch.Tensor, method: MajoritySign) -> torch.Tensor:
    """True where a tensor's sign is the majority's: of the sum ("total") or of the count ("frequency"); a draw counts as +."""
    signs = stacked.sign()
    votes = (stacked if method == "total" else signs).sum(dim=0)
    return signs == torch.where(votes >= 0, 1, -1)


def low_rank(
    delta: torch.Tensor,
    r: int,
    *,
    clamp: float | None = None,
    full_matrices: bool = True,
    driver: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, K], B [N, r]) with B A the best approximation of rank r to delta [N, K]; zeros where r is above min(N, K).

    clamp: a quantile of all values of A and B; values beyond it, on either side, are cut to it
    """
    u, sigma, vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    found = min(r, len(sigma))
    b, a = u[:, :found] @ torch.diag(sigma[:found]), vh[:found]
    if clamp is not None:
        limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    return a, b
