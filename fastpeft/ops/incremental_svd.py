"""Principal components of rows that come in batches: the leading right singular vectors of all rows seen, less their mean.

    first batch     X - mean(X) = U S V^T
    a later one     [S V^T; X - mean(X); sqrt(n_seen n / (n_seen + n)) (mean_seen - mean(X))] = U' S' V'^T

Only V [n_components, K], S, the mean and the variance are kept. The decomposition takes subspace iterations (Halko et al. 2011)
from a seed of its own, as PEFT's does, so results are repeated.

Source:  Ross et al. 2008, "Incremental learning for robust visual tracking"; arXiv:0909.4061
"""

import torch

SEED, ITERATIONS = 42, 4


class IncrementalSVD:
    """The leading `n_components` of what `add` has seen.

    components [n_components, K], singular_values [n_components] and explained [n_components] (share of the whole variance)
    are None before the first batch.
    """

    def __init__(self, n_components: int):
        self.n_components = n_components
        self.components: torch.Tensor | None = None
        self.singular_values: torch.Tensor | None = None
        self.explained: torch.Tensor | None = None
        self._count = 0
        self._mean: torch.Tensor | None = None  # float64, as the variance
        self._variance: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, rows: torch.Tensor) -> None:
        """Take in rows [n, K], n >= n_components. Raises ValueError for fewer rows or columns."""
        n, k = rows.shape
        if min(n, k) < self.n_components:
            raise ValueError(f"IncrementalSVD: expected at least {self.n_components} rows and columns, got [{n}, {k}]")
        rows = rows.to(torch.float32)
        seen = self._count
        mean, variance = self._with(rows)
        if self.components is None:
            stacked = (rows - mean).to(torch.float32)
        else:
            own_mean = rows.mean(dim=0)
            jump = (seen / (seen + n) * n) ** 0.5 * (self._mean - own_mean)
            stacked = torch.vstack([self.singular_values[:, None] * self.components, rows - own_mean, jump[None]])
        singular, vectors = _leading(stacked, 2 * self.n_components)
        self._count, self._mean, self._variance = seen + n, mean, variance
        self.components, self.singular_values = vectors[: self.n_components], singular[: self.n_components]
        self.explained = (singular**2 / (variance * self._count).sum())[: self.n_components]

    def _with(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of all rows, these among them."""
        n, wide = rows.shape[0], rows.to(torch.float64)
        own_mean = wide.mean(dim=0)
        spread = (wide - own_mean).square().sum(dim=0)
        if self._mean is None:
            return own_mean, spread / n
        total = self._count + n
        mean = (self._mean * self._count + own_mean * n) / total
        between = self._count * n / total * (self._mean - own_mean).square()
        return mean, (self._variance * self._count + spread + between) / total


def _leading(matrix: torch.Tensor, q: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(S [q], V^T [q, K]); each row's largest element is positive."""
    q = min(q, *matrix.shape)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(SEED)
        _, singular, v = torch.svd_lowrank(matrix, q=q, niter=ITERATIONS)
    vectors = v.t()
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    return singular, vectors * vectors.gather(1, largest).sign()
