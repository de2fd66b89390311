"""Metrics against what they are defined as."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastpeft.training.metrics import (
    causal_lm_metrics,
    classification_metrics,
    confusion_matrix,
    roc_curve,
    token_scores,
)
from fastpeft.training.tokenise import IGNORED
from tests.tolerance import METRICS_REPEATED


def test_binary_metrics_by_hand():
    """Four rows: true 1 1 0 0, predicted 1 0 1 0, scores in an order with three of four pairs right."""
    logits = np.log(np.array([[0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]]))
    labels = np.array([1, 1, 0, 0])
    found = classification_metrics(logits, labels)
    assert found["accuracy"] == found["precision"] == found["recall"] == found["f1"] == 0.5
    assert found["roc_auc"] == 0.75
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.4, 0.3, 0.9]).mean())
    assert confusion_matrix(logits, labels) == [[1, 1], [1, 1]]
    curve = roc_curve(logits, labels)
    assert curve["auc"] == 0.75
    assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0.0, 0.0, 1.0, 1.0)


def test_several_classes_are_averaged_and_an_absent_class_has_no_roc_auc():
    logits = np.eye(3)[[0, 1, 1, 2]] * 5.0
    found = classification_metrics(logits, np.array([0, 1, 2, 2]))
    assert found["accuracy"] == 0.75
    assert found["recall"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert 0.5 < found["roc_auc"] <= 1.0
    absent = classification_metrics(logits, np.array([0, 1, 1, 1]))
    assert "roc_auc" not in absent
    assert roc_curve(logits, np.array([0, 1, 2, 2])) is None


def test_token_metrics_count_tokens_not_batches():
    """Two batches of different numbers of tokens give the mean over all tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    labels[0, :4] = IGNORED
    shifted_logits, shifted = logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    expected = F.cross_entropy(shifted_logits, shifted, ignore_index=IGNORED).item()
    parts = np.concatenate([token_scores(logits[rows], labels[rows]).numpy() for rows in ([0], [1, 2])])
    found = causal_lm_metrics(parts)
    assert found["loss"] == pytest.approx(expected, rel=METRICS_REPEATED)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=METRICS_REPEATED)
    assert found["tokens"] == 9
    wanted = shifted != IGNORED
    right = (shifted_logits.argmax(-1) == shifted)[wanted].double().mean().item()
    assert found["token_accuracy"] == pytest.approx(right)
