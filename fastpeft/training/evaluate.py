"""Forward passes without gradients: class logits, token scores and generated responses, in the order of the rows.

Rows are batched by length, so that little is padded, and put back in order. The random state is not touched.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from fastpeft.training.metrics import token_scores
from fastpeft.training.precision import autocast
from fastpeft.training.tokenise import Collator

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Evaluator:
    """A model, how its rows are padded, and how large a batch is.

    model is a transformers model or a fastpeft.PeftModel; bf16 computes under bfloat16 autocast.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32, bf16: bool = False, progress: bool = True):
        self.model, self.tokenizer, self.batch_size, self.bf16 = model, tokenizer, batch_size, bf16
        self.progress = progress
        self.collate = Collator(tokenizer)
        self.device = next(model.parameters()).device

    def class_logits(self, features: Dataset, description: str = "evaluate") -> np.ndarray:
        """Logits [N, C] float32."""
        batches = self._forward(features, description)
        return self._in_order(len(features), ((rows, logits.float()) for rows, logits, _ in batches))

    def token_scores(self, features: Dataset, description: str = "evaluate") -> np.ndarray:
        """[N, 3] float64 per row: summed negative log likelihood, correct tokens, tokens with a loss."""
        batches = self._forward(features, description)
        return self._in_order(len(features), ((rows, token_scores(logits, labels)) for rows, logits, labels in batches))

    def responses(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, description: str = "generate"
    ) -> list[str]:
        """What the model writes, greedily, after each prompt (token ids), without special tokens."""
        found: dict[int, str] = {}
        for rows in self._batches([len(ids) for ids in prompts], description):
            batch = self.collate.left_padded([list(prompts[row]) for row in rows])
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with self._frozen():
                written = self.model.generate(
                    **batch,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.collate.fill["input_ids"],
                )
            new = written[:, batch["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            found.update(zip(rows, (text.strip() for text in texts), strict=True))
        return [found[row] for row in range(len(prompts))]

    def _forward(
        self, features: Dataset, description: str
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor | None]]:
        for rows in self._batches(features["length"], description):
            batch = self.collate([features[row] for row in rows])
            inputs = {name: batch[name].to(self.device) for name in _INPUTS if name in batch}
            labels = batch["labels"].to(self.device) if "labels" in batch else None
            with self._frozen(), autocast(self.device, self.bf16):
                logits = self.model(**inputs).logits
            yield rows, logits, labels

    def _batches(self, lengths: Sequence[int], description: str) -> Iterator[list[int]]:
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        with tqdm(total=len(order), desc=description, unit="row", disable=not self.progress, leave=False) as bar:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                yield rows
                bar.update(len(rows))

    def _in_order(self, count: int, batches: Iterator[tuple[list[int], torch.Tensor]]) -> np.ndarray:
        placed: np.ndarray | None = None
        for rows, values in batches:
            if placed is None:
                placed = np.empty((count, *values.shape[1:]), dtype=values.cpu().numpy().dtype)
            placed[rows] = values.cpu().numpy()
        return np.empty((0, 0)) if placed is None else placed

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Evaluation mode without gradients; the training mode is put back."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)
