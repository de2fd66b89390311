"""Metrics of held-out rows under weights: what a resampling needs, without computing anything twice.

A metric is a function of weights, [B, N] -> [B] float64: row n counts weights[b, n] times in draw b, and weights of one give
the metric itself. A bootstrap's weights are counts of drawn rows, a jackknife's leave a row out, and a permutation's
choose one of two predictions for each row. A metric that is not defined in a draw (ROC-AUC without one of the classes) is NaN
there.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fastpeft.training.metrics import class_probabilities

RowMetric = Callable[[np.ndarray], np.ndarray]
LOWER_IS_BETTER = ("loss", "perplexity")


def row_metrics(rows: Mapping[str, np.ndarray]) -> dict[str, RowMetric]:
    """The metrics of what one run says of its held-out rows.

    rows:  {"logits" [N, C], "labels" [N]} of a classifier: accuracy, loss, f1_macro, and of two classes also f1, precision,
           recall, roc_auc of class 1; {"scores" [N, 3]} of a causal LM, as `token_scores` gives them: loss, perplexity,
           token_accuracy, exact_match
    """
    if "scores" in rows:
        return _of_tokens(np.asarray(rows["scores"], dtype=np.float64))
    return _of_classes(np.asarray(rows["logits"]), np.asarray(rows["labels"]))


def row_outcomes(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N] bool: whether a row is right: its class, or every one of its tokens."""
    if "scores" in rows:
        return rows["scores"][:, 1] == rows["scores"][:, 2]
    return np.asarray(rows["logits"]).argmax(axis=-1) == rows["labels"]


def joined(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of two runs one after the other: weights [1 - s, s] then take s of the second."""
    return {name: np.concatenate([first[name], second[name]]) for name in first}


def _of_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, RowMetric]:
    probabilities = class_probabilities(logits)
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=-1)
    right = (predicted == labels).astype(np.float64)
    chosen = np.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0]
    nll = -np.log(np.maximum(chosen, np.finfo(np.float64).tiny))
    found: dict[str, RowMetric] = {
        "accuracy": _ratio(right),
        "loss": _ratio(nll),
        "f1_macro": lambda w: np.mean([_f1(predicted == c, labels == c)(w) for c in range(classes)], axis=0),
    }
    if classes == 2:
        positive, said = labels == 1, predicted == 1
        found["f1"] = _f1(said, positive)
        found["precision"] = _ratio((said & positive).astype(np.float64), said.astype(np.float64))
        found["recall"] = _ratio((said & positive).astype(np.float64), positive.astype(np.float64))
        if 0 < positive.sum() < len(positive):
            found["roc_auc"] = _roc_auc(probabilities[:, 1], positive)
    return found


def _of_tokens(scores: np.ndarray) -> dict[str, RowMetric]:
    nll, correct, count = scores.T
    loss = _ratio(nll, count)
    return {
        "loss": loss,
        "perplexity": lambda w: np.exp(np.minimum(loss(w), 700.0)),
        "token_accuracy": _ratio(correct, count),
        "exact_match": _ratio(((correct == count) & (count > 0)).astype(np.float64), (count > 0).astype(np.float64)),
    }


def _ratio(part: np.ndarray, whole: np.ndarray | None = None) -> RowMetric:
    """Weighted sum over weighted sum; 0 where there is nothing to divide by, as scikit-learn's zero_division=0."""
    whole = np.ones_like(part) if whole is None else whole

    def measure(weights: np.ndarray) -> np.ndarray:
        below = weights @ whole
        return np.divide(weights @ part, below, out=np.zeros_like(below), where=below > 0)

    return measure


def _f1(said: np.ndarray, true: np.ndarray) -> RowMetric:
    return _ratio(2.0 * (said & true), said.astype(np.float64) + true)


def _roc_auc(scores: np.ndarray, positive: np.ndarray) -> RowMetric:
    """P(score of a positive > score of a negative) + P(equal) / 2, by one sort for all draws."""
    order = np.argsort(scores, kind="stable")
    ranked, is_positive = scores[order], positive[order].astype(np.float64)
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last row of every group of equal scores

    def measure(weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, order].astype(np.float64)
        negatives = np.cumsum(drawn * (1.0 - is_positive), axis=1)[:, ends]
        positives = np.cumsum(drawn * is_positive, axis=1)[:, ends]
        in_group = np.diff(positives, axis=1, prepend=0.0)
        below = np.concatenate([np.zeros((len(drawn), 1)), negatives[:, :-1]], axis=1)
        pairs = positives[:, -1] * negatives[:, -1]
        ordered = (in_group * (below + negatives) / 2.0).sum(axis=1)
        return np.divide(ordered, pairs, out=np.full_like(pairs, np.nan), where=pairs > 0)

    return measure
