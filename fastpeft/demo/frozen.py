"""The baseline a fine-tuned encoder has to beat: a linear classifier on the encoder's frozen sentence embeddings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

from fastpeft.ops.fast_matmul import fast_float32_matmul

DESCRIPTION = "logistic regression on the frozen encoder's mean-pooled embeddings of the same training rows"


def frozen_logits(
    model: Path, train: Sequence[str], labels: Sequence[int], test: Sequence[str], *, max_length: int
) -> np.ndarray:
    """Class logits [N, 2] of the `test` texts by logistic regression on embeddings [N, H] of the frozen `model`."""
    with fast_float32_matmul(torch.device("cpu")):
        embeddings = mean_embeddings(model, [*train, *test], max_length=max_length)
    scaler = StandardScaler().fit(embeddings[: len(train)])
    features = scaler.transform(embeddings)
    classifier = LogisticRegression(max_iter=1000).fit(features[: len(train)], labels)
    score = classifier.decision_function(features[len(train) :])
    return np.stack([np.zeros_like(score), score], axis=1)


@torch.no_grad()
def mean_embeddings(model: Path, texts: Sequence[str], *, max_length: int, batch_size: int = 64) -> np.ndarray:
    """Mean of the last hidden states over each text's tokens, [N, H] float32, as the encoder was pretrained to pool."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    embeddings = np.empty((len(texts), encoder.config.hidden_size), dtype=np.float32)
    with tqdm(total=len(texts), desc="frozen encoder", unit="row", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [texts[row] for row in rows]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            hidden = encoder(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            embeddings[rows] = ((hidden * mask).sum(dim=1) / mask.sum(dim=1)).numpy()
            bar.update(len(rows))
    return embeddings
