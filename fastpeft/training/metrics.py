"""Metrics: accuracy, f1, precision, recall, ROC-AUC of classes; loss, perplexity, token accuracy of a causal LM."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import metrics as sk

from fastpeft.training.tokenise import IGNORED

ROC_POINTS = 200


def class_probabilities(logits: np.ndarray) -> np.ndarray:
    """softmax over the last axis, [N, C] float64, rows sum to 1."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of logits [N, C] against labels [N].

    loss is the mean cross-entropy in nats. Two classes: precision, recall, f1, roc_auc of class 1. More: the macro
    average, ROC-AUC one class against the rest.
    f1_macro is the mean of the classes' f1 in both cases. roc_auc is left out where a class has no row (it is not defined).
    """
    probabilities = class_probabilities(logits)
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=-1)
    average = "binary" if classes == 2 else "macro"
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        labels, predicted, labels=None if classes == 2 else range(classes), average=average, zero_division=0.0
    )
    chosen = np.take_along_axis(probabilities, labels[:, None], axis=-1)
    result = {
        "loss": float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean()),
        "accuracy": float((predicted == labels).mean()),
        "f1": float(f1),
        "f1_macro": float(sk.f1_score(labels, predicted, labels=range(classes), average="macro", zero_division=0.0)),
        "precision": float(precision),
        "recall": float(recall),
    }
    if len(np.unique(labels)) == classes:
        scores = probabilities[:, 1] if classes == 2 else probabilities
        result["roc_auc"] = float(sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro"))
    return result


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Counts [C, C]: row the true label, column the predicted one."""
    return sk.confusion_matrix(labels, logits.argmax(axis=-1), labels=range(logits.shape[1])).tolist()


def roc_curve(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any] | None:
    """{"fpr", "tpr", "auc"} of class 1 with at most ROC_POINTS points, or None unless both of two classes are there."""
    if logits.shape[1] != 2 or len(np.unique(labels)) != 2:
        return None
    scores = class_probabilities(logits)[:, 1]
    fpr, tpr, _ = sk.roc_curve(labels, scores)
    points = np.unique(np.linspace(0, len(fpr) - 1, min(len(fpr), ROC_POINTS)).round().astype(int))
    area = float(sk.roc_auc_score(labels, scores))
    return {"fpr": fpr[points].tolist(), "tpr": tpr[points].tolist(), "auc": area}


def token_scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per row of a batch: summed negative log likelihood (nats), correct next tokens, tokens with a loss.

    Shapes:  logits [B, S, V], or [B, T + S, V] of a model with a prompt of T virtual tokens, which are not scored;
             labels [B, S] -> float64 [B, 3]; position i predicts label i + 1
    """
    logits = logits[:, logits.shape[1] - labels.shape[1] :]
    shifted = labels[:, 1:]
    wanted = shifted != IGNORED
    chosen, targets = logits[:, :-1][wanted].float(), shifted[wanted]
    rows = wanted.nonzero()[:, 0]
    per_token = torch.stack(
        [
            F.cross_entropy(chosen, targets, reduction="none").double(),
            (chosen.argmax(dim=-1) == targets).double(),
            torch.ones_like(targets, dtype=torch.float64),
        ],
        dim=1,
    )
    return torch.zeros(len(labels), 3, dtype=torch.float64, device=logits.device).index_add_(0, rows, per_token)


def causal_lm_metrics(scores: np.ndarray | Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics over all tokens of the rows `token_scores` gave, [N, 3]; loss is the mean over tokens, in nats.

    exact_match is the share of rows with every token right: those that greedy decoding reproduces to the end.
    """
    scores = np.asarray(scores, dtype=np.float64)
    nll, correct, count = scores.sum(axis=0)
    loss = float(nll / count)
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700.0 else math.inf,
        "token_accuracy": float(correct / count),
        "exact_match": float((scores[:, 1] == scores[:, 2])[scores[:, 2] > 0].mean()),
        "tokens": int(count),
    }
