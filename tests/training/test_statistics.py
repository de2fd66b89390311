"""Intervals and tests against scipy, scikit-learn, and values that are known."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from fastpeft.training.metrics import causal_lm_metrics, class_probabilities, classification_metrics
from fastpeft.training.row_metrics import joined, row_metrics, row_outcomes
from fastpeft.training.statistics import bootstrap_interval, holm, mcnemar, paired_permutation, pooled
from tests.tolerance import CHANCE, KEEP_RATE_SIGMAS, RESAMPLED_BOUND, RESAMPLED_P


def classes(rows: int, seed: int, *, count: int = 2, sure: float = 1.0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = np.random.default_rng(0).integers(0, count, rows)  # the rows are the same for every seed
    return {"logits": draw.normal(size=(rows, count)).round(1) + sure * np.eye(count)[labels], "labels": labels}


def tokens(rows: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    count = np.random.default_rng(0).integers(1, 5, rows)
    return {"scores": np.stack([draw.gamma(2.0, size=rows), draw.integers(0, count + 1), count], axis=1).astype(float)}


@pytest.mark.parametrize("count", [2, 3])
def test_weights_of_one_give_the_engines_metrics(count):
    rows = classes(61, 1, count=count)
    expected = classification_metrics(rows["logits"], rows["labels"])
    found = {name: metric(np.ones((1, 61)))[0] for name, metric in row_metrics(rows).items()}
    assert set(found) <= set(expected)
    assert ("roc_auc" in found) == (count == 2)
    assert found == pytest.approx({name: expected[name] for name in found})


def test_counts_are_scikit_learns_sample_weights():
    """With ties among the scores, and draws that leave rows out."""
    rows = classes(61, 1)
    weights = np.random.default_rng(2).multinomial(61, np.full(61, 1 / 61), size=5)
    labels, scores = rows["labels"], class_probabilities(rows["logits"])[:, 1]
    assert len(set(scores)) < 61
    said = rows["logits"].argmax(axis=1)
    theirs = {
        "accuracy": lambda w: sk.accuracy_score(labels, said, sample_weight=w),
        "f1": lambda w: sk.f1_score(labels, said, sample_weight=w),
        "f1_macro": lambda w: sk.f1_score(labels, said, sample_weight=w, average="macro"),
        "precision": lambda w: sk.precision_score(labels, said, sample_weight=w),
        "recall": lambda w: sk.recall_score(labels, said, sample_weight=w),
        "roc_auc": lambda w: sk.roc_auc_score(labels, scores, sample_weight=w),
        "loss": lambda w: sk.log_loss(labels, scores, sample_weight=w),
    }
    ours = row_metrics(rows)
    assert set(theirs) == set(ours)
    for name, measure in theirs.items():
        assert ours[name](weights) == pytest.approx([measure(w) for w in weights]), name


def test_token_metrics_are_the_engines():
    rows = tokens(20, 1)
    expected = causal_lm_metrics(rows["scores"])
    found = {name: metric(np.ones((1, 20)))[0] for name, metric in row_metrics(rows).items()}
    assert found == pytest.approx({name: expected[name] for name in found})
    drawn = np.random.default_rng(0).integers(0, 20, 20)
    expected = causal_lm_metrics(rows["scores"][drawn])
    weights = np.bincount(drawn, minlength=20)[None]
    assert {name: metric(weights)[0] for name, metric in row_metrics(rows).items()} == pytest.approx(
        {name: expected[name] for name in found}
    )
    assert expected["exact_match"] == row_outcomes(rows)[drawn].mean()


def test_a_class_without_rows_has_no_roc_auc():
    rows = {"logits": np.eye(2)[[0, 1, 1]], "labels": np.array([0, 1, 1])}
    measured = row_metrics(rows)["roc_auc"](np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]]))
    assert measured[0] == 1.0
    assert np.isnan(measured[1])


@pytest.mark.parametrize("kind", ["percentile", "bca"])
def test_the_interval_is_scipys(kind):
    """Of a skewed mean; both draw at random, so they agree to a fraction of the interval's width."""
    values = np.random.default_rng(3).exponential(size=80)
    ours = bootstrap_interval(lambda w: w @ values / w.sum(axis=1), 80, kind=kind, resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method=kind, n_resamples=20_000, rng=np.random.default_rng(4)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert [ours.low, ours.high] == pytest.approx(list(theirs), abs=RESAMPLED_BOUND * (theirs.high - theirs.low))


def test_bca_corrects_what_percentiles_do_not():
    values = np.random.default_rng(3).exponential(size=40)
    plain, corrected = (
        bootstrap_interval(lambda w: w @ values / w.sum(axis=1), 40, kind=kind) for kind in ("percentile", "bca")
    )
    assert corrected.low > plain.low
    assert corrected.high > plain.high


def test_an_interval_covers_as_often_as_it_says():
    """200 samples of an accuracy of 0.8: an interval of 90 % misses it in about 20 of them."""
    draw, covered = np.random.default_rng(5), 0
    for sample in range(200):
        right = (draw.random(100) < 0.8).astype(float)
        found = bootstrap_interval(lambda w, r=right: w @ r / 100, 100, confidence=0.9, resamples=400, seed=sample)
        covered += found.low <= 0.8 <= found.high
    assert stats.binomtest(covered, 200, 0.9).pvalue > CHANCE


def test_an_interval_repeats_by_its_seed_and_knows_its_edges():
    metric = row_metrics(classes(50, 1))["f1"]
    assert bootstrap_interval(metric, 50, seed=1) == bootstrap_interval(metric, 50, seed=1)
    assert bootstrap_interval(metric, 50, seed=1) != bootstrap_interval(metric, 50, seed=2)
    perfect = bootstrap_interval(lambda w: w @ np.ones(9) / 9, 9)
    assert (perfect.value, perfect.low, perfect.high) == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="at least 1 row and 100 resamples, got 0 and 2000"):
        bootstrap_interval(metric, 0)
    with pytest.raises(ValueError, match="kind bca or percentile"):
        bootstrap_interval(metric, 50, kind="normal")


def test_seeds_do_not_narrow_an_interval():
    """The same run three times is one run: rows that are shared between seeds are not more rows."""
    metric = row_metrics(classes(100, 1))["accuracy"]
    once, thrice = (bootstrap_interval(pooled([metric] * count), 100) for count in (1, 3))
    assert (once.low, once.high) == pytest.approx((thrice.low, thrice.high))


def test_mcnemar_is_the_binomial_of_the_rows_that_differ():
    """Textbook: 10 against 2 discordant rows: 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12 = 158 / 4096."""
    first = np.array([True] * 10 + [False] * 2 + [True] * 30 + [False] * 5)
    second = np.array([False] * 10 + [True] * 2 + [True] * 30 + [False] * 5)
    found = mcnemar(first, second)
    assert (found.first_only, found.second_only) == (10, 2)
    assert found.p == pytest.approx(158 / 4096)
    assert mcnemar(second, first).p == found.p
    assert mcnemar(first, first).p == 1.0
    tripled = mcnemar(np.stack([first] * 3, axis=1), np.stack([second] * 3, axis=1))
    assert tripled == found  # three equal seeds are not three times the evidence
    with pytest.raises(ValueError, match="the same rows and seeds"):
        mcnemar(first, second[:-1])


def test_the_permutation_test_is_exact_on_few_rows():
    """All 2^8 exchanges by hand, for a metric that is no mean over rows."""
    a, b = classes(8, 1, sure=1.5), classes(8, 2, sure=0.0)
    metric = row_metrics(joined(a, b))["roc_auc"]

    def auc(picked: np.ndarray) -> float:
        logits = np.where(picked[:, None] == 1, b["logits"], a["logits"])
        return sk.roc_auc_score(a["labels"], class_probabilities(logits)[:, 1])

    exchanges = [np.array(bits) for bits in itertools.product((0, 1), repeat=8)]
    differences = np.array([auc(bits) - auc(1 - bits) for bits in exchanges])
    found = paired_permutation(metric, 8, resamples=20_000)
    assert found.difference == pytest.approx(differences[0])
    exact = (np.abs(differences) >= abs(differences[0]) - 1e-12).mean()
    assert found.p == pytest.approx(exact, abs=KEEP_RATE_SIGMAS * np.sqrt(exact * (1 - exact) / 20_000))


def test_the_permutation_test_of_a_mean_is_scipys():
    a, b = tokens(40, 1)["scores"], tokens(40, 2)["scores"] * [1.3, 1, 1]
    a[:, 2] = b[:, 2] = 1.0
    found = paired_permutation(row_metrics({"scores": np.concatenate([a, b])})["loss"], 40, resamples=20_000)
    theirs = stats.permutation_test(
        (a[:, 0], b[:, 0]),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        permutation_type="samples", vectorized=True, n_resamples=20_000, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert found.difference == pytest.approx(theirs.statistic)
    assert found.p == pytest.approx(theirs.pvalue, abs=RESAMPLED_P)


def test_equal_methods_differ_no_more_often_than_chance():
    """p-values under the null hypothesis are at most as small as they say."""
    small = 0
    for seed in range(200):
        a, b = classes(40, 2 * seed + 1), classes(40, 2 * seed + 2)
        small += paired_permutation(row_metrics(joined(a, b))["f1"], 40, resamples=200, seed=seed).p <= 0.1
    assert stats.binomtest(small, 200, 0.1, alternative="greater").pvalue > CHANCE


def test_no_difference_is_certain_never():
    rows = classes(30, 1)
    same = paired_permutation(row_metrics(joined(rows, rows))["loss"], 30)
    assert (same.difference, same.p) == pytest.approx((0.0, 1.0))
    worst = {**rows, "logits": -20 * np.eye(2)[rows["labels"]]}
    best = {**rows, "logits": 20 * np.eye(2)[rows["labels"]]}
    found = paired_permutation(row_metrics(joined(best, worst))["loss"], 30, resamples=200)
    assert found.p == 1 / 201


def test_holm_by_hand():
    """Holm 1979: 0.01, 0.04, 0.03, 0.005 -> 0.03, 0.06, 0.06, 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    with_gap = holm([0.01, float("nan"), 0.02])
    assert with_gap[0] == pytest.approx(0.02)
    assert np.isnan(with_gap[1])
    assert with_gap[2] == pytest.approx(0.02)
