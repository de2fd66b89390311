"""How sure a comparison on held-out rows is: bootstrap intervals, paired tests, and Holm's correction.

The unit of every draw is a held-out row, never a (row, seed) pair: runs of several seeds see the same rows, and counting a row
once for each seed would make intervals and p-values too small. What a method scores is the mean of the metric over its seeds, and
a draw takes or exchanges a row in all of its seeds at once. So all of this is about the rows that were drawn, given the runs that
were trained; how much seeds differ is a standard deviation of its own, beside it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fastpeft.training.row_metrics import RowMetric

_ELEMENTS = 4_000_000  # weights held at once: 32 MB
_JACKKNIFE_GROUPS = 1000


@dataclass(frozen=True)
class Interval:
    """A metric of all rows, and the interval of `confidence` around it."""

    value: float
    low: float
    high: float


def pooled(metrics: Sequence[RowMetric]) -> RowMetric:
    """The mean over seeds of one metric, every seed under the same weights."""
    return lambda weights: np.mean([metric(weights) for metric in metrics], axis=0)


def bootstrap_interval(
    metric: RowMetric, rows: int, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0, kind: str = "bca"
) -> Interval:
    """The interval of a metric by drawing its rows again, with replacement.

    kind:     "percentile": the quantiles of the draws; "bca": corrected for their bias and skewness (Efron 1987), with the
              acceleration from leaving rows out one by one, or in 1000 groups where there are more. Falls back to the percentiles
              where the correction is not defined: all draws on one side of the value, or no variation
    Assumes:  rows are independent draws from what the model will see; runs are taken as they are
    Raises:   ValueError for no rows, an unknown kind, a confidence outside (0, 1), or fewer than 100 resamples
    """
    _check(rows, resamples)
    if kind not in ("bca", "percentile") or not 0 < confidence < 1:
        raise ValueError(
            f"bootstrap: expected kind bca or percentile and 0 < confidence < 1, got {kind!r}, {confidence}"
        )
    generator = np.random.default_rng(seed)
    draws = _in_chunks(metric, rows, resamples, lambda n: generator.multinomial(rows, np.full(rows, 1 / rows), size=n))
    draws = draws[np.isfinite(draws)]
    value = float(metric(np.ones((1, rows)))[0])
    if not len(draws):
        return Interval(value, math.nan, math.nan)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if kind == "bca":
        tails = _bca_tails(tails, draws, value, _left_out(metric, rows))
    low, high = np.quantile(draws, tails)
    return Interval(value, float(low), float(high))


def _left_out(metric: RowMetric, rows: int) -> np.ndarray:
    """The metric without each group of rows."""
    groups = np.arange(rows) % min(rows, _JACKKNIFE_GROUPS)
    count = int(groups.max()) + 1
    chunk = max(1, _ELEMENTS // rows)
    parts = [metric((groups != np.arange(i, min(i + chunk, count))[:, None]) * 1.0) for i in range(0, count, chunk)]
    return np.concatenate(parts)


def _bca_tails(tails: np.ndarray, draws: np.ndarray, value: float, left_out: np.ndarray) -> np.ndarray:
    below = ((draws < value).mean() + (draws <= value).mean()) / 2  # ties count by half
    left_out = left_out[np.isfinite(left_out)]
    away = left_out.mean() - left_out if len(left_out) else np.zeros(1)
    spread = (away**2).sum()
    if not 0 < below < 1 or spread == 0:
        return tails
    bias, acceleration = stats.norm.ppf(below), (away**3).sum() / (6 * spread**1.5)
    z = bias + stats.norm.ppf(tails)
    return stats.norm.cdf(bias + z / (1 - acceleration * z))


@dataclass(frozen=True)
class McNemar:
    """Rows that only the first, or only the second, gets right (in more of its seeds), and the two-sided p-value."""

    first_only: int
    second_only: int
    p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """McNemar's exact test on rows that are right or wrong: of the rows where two methods differ, half should favour each.

    Shapes:   first, second [N] bool, or [N, seeds]: then a row favours the method that has it right in more seeds, which is the
              exact sign test over rows, and McNemar's with one seed. Rows without a difference say nothing
    Assumes:  rows are independent; under the null hypothesis a row that tells two methods apart favours either with 1/2
    Raises:   ValueError for shapes that differ
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape:
        raise ValueError(f"mcnemar: expected the same rows and seeds, got {first.shape} and {second.shape}")
    lead = first.reshape(len(first), -1).sum(axis=1) - second.reshape(len(second), -1).sum(axis=1)
    more, less = int((lead > 0).sum()), int((lead < 0).sum())
    p = stats.binomtest(more, more + less, 0.5).pvalue if more + less else 1.0
    return McNemar(more, less, float(p))


@dataclass(frozen=True)
class Permutation:
    """First minus second, and the two-sided p-value."""

    difference: float
    p: float


def paired_permutation(metric: RowMetric, rows: int, *, resamples: int = 2000, seed: int = 0) -> Permutation:
    """A test of the difference of one metric by exchanging the two methods' predictions of a row, row by row.

    metric:   of 2 N rows, the first method's and then the second's (row_metrics.joined), pooled over seeds that are paired in
              their order; a row is exchanged in all seeds at once
    p:        (1 + draws at least as far from 0 as the difference) / (1 + draws): never 0, and valid for any number of draws
    Assumes:  under the null hypothesis a row's two predictions could as well have come from each other's method; for ROC-AUC and
              loss this includes that both put their scores on one scale
    Raises:   ValueError for no rows, or fewer than 100 resamples
    """
    _check(rows, resamples)
    generator = np.random.default_rng(seed)

    def difference(exchanged: np.ndarray) -> np.ndarray:
        kept = 1.0 - exchanged
        first, second = np.concatenate([kept, exchanged], axis=1), np.concatenate([exchanged, kept], axis=1)
        return metric(first) - metric(second)

    found = float(difference(np.zeros((1, rows)))[0])
    if not math.isfinite(found):
        return Permutation(found, math.nan)
    draws = _in_chunks(
        difference, 2 * rows, resamples, lambda n: generator.integers(0, 2, (n, rows)).astype(np.float64)
    )
    draws = draws[np.isfinite(draws)]
    slack = 1e-12 * max(1.0, abs(found))  # the same difference summed in another order
    extreme = int((np.abs(draws) >= abs(found) - slack).sum())
    return Permutation(found, (1 + extreme) / (1 + len(draws)))


def holm(p_values: Mapping[str, float] | Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the given order: reject where one is at most alpha.

    The k-th smallest of m is multiplied by m - k + 1, and none is below one before it. The chance of any false rejection among
    all of them stays at most alpha, however they depend on each other. NaN (a test that could not be made) stays NaN and is not
    counted.
    """
    values = np.asarray(list(p_values.values()) if isinstance(p_values, Mapping) else list(p_values), dtype=np.float64)
    known = np.flatnonzero(np.isfinite(values))
    corrected = np.full(len(values), np.nan)
    running = 0.0
    for rank, index in enumerate(known[np.argsort(values[known], kind="stable")]):
        running = max(running, min(1.0, float(values[index]) * (len(known) - rank)))
        corrected[index] = running
    return corrected.tolist()


def _in_chunks(metric: RowMetric, width: int, draws: int, weights) -> np.ndarray:
    chunk = max(1, min(draws, _ELEMENTS // width))
    return np.concatenate([metric(weights(min(chunk, draws - start))) for start in range(0, draws, chunk)])


def _check(rows: int, resamples: int) -> None:
    if rows < 1 or resamples < 100:
        raise ValueError(f"statistics: expected at least 1 row and 100 resamples, got {rows} and {resamples}")
