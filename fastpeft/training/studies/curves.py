"""Curves of several seeds as one: the mean of their ordinates at common abscissas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import metrics as sk

from fastpeft.training.metrics import class_probabilities

_GRID = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Curve:
    """Points of a mean curve, and the mean of the areas under its parts."""

    points: list[tuple[float, float]]
    area: float


def mean_roc(rows: Sequence[Mapping[str, np.ndarray]]) -> Curve | None:
    """The mean true positive rate at every false positive rate (vertical averaging), and the mean area; None but for two classes.

    rows: {"logits" [N, 2], "labels" [N]} a seed
    """
    if not _two_classes(rows):
        return None
    heights, areas = [], []
    for labels, scores in map(_scored, rows):
        fpr, tpr, _ = sk.roc_curve(labels, scores)
        heights.append(np.interp(_GRID, fpr, tpr))
        areas.append(sk.roc_auc_score(labels, scores))
    points = [(0.0, 0.0), *zip(_GRID.tolist(), np.mean(heights, axis=0).tolist())]
    return Curve(points, float(np.mean(areas)))


def mean_precision_recall(rows: Sequence[Mapping[str, np.ndarray]]) -> Curve | None:
    """The mean precision at every recall, and the mean average precision; None but for two classes.

    Precision at a recall is that of the largest threshold which reaches it: no line is drawn between points (Davis & Goadrich
    2006).
    """
    if not _two_classes(rows):
        return None
    heights, areas = [], []
    for labels, scores in map(_scored, rows):
        precision, recall, _ = sk.precision_recall_curve(labels, scores)
        precision, recall = precision[::-1], recall[::-1]
        reached = np.searchsorted(recall, np.maximum(_GRID, recall[recall > 0].min()), side="left")
        heights.append(precision[np.minimum(reached, len(precision) - 1)])
        areas.append(sk.average_precision_score(labels, scores))
    return Curve(list(zip(_GRID.tolist(), np.mean(heights, axis=0).tolist())), float(np.mean(areas)))


def mean_curve(histories: Sequence[Sequence[Mapping[str, Any]]], name: str) -> list[tuple[float, float]]:
    """(step, mean over the runs that logged it) of one number of the histories."""
    found: dict[float, list[float]] = {}
    for history in histories:
        for entry in history:
            if isinstance(entry.get(name), (int, float)) and isinstance(entry.get("step"), (int, float)):
                found.setdefault(entry["step"], []).append(entry[name])
    return [(step, sum(values) / len(values)) for step, values in sorted(found.items())]


def _two_classes(rows: Sequence[Mapping[str, np.ndarray]]) -> bool:
    return all(row["logits"].shape[1] == 2 and len(np.unique(row["labels"])) == 2 for row in rows)


def _scored(row: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return row["labels"], class_probabilities(row["logits"])[:, 1]
