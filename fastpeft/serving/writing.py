"""Generation in one batch whose rows differ: each has its own temperature, top_p, seed and length.

The token of a row is argmax(log p) where it is greedy, and argmax(log p - log q), q ~ Exponential(1), where it samples: a draw
from p (the Gumbel trick). q comes from a generator of the row's own, so a seed gives its text whatever else is in the batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, StoppingCriteria


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one row is written. temperature 0 is greedy; top_p keeps the likeliest tokens whose probabilities sum to it."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "0 (greedy) to 100"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


class RowSampler(LogitsProcessor):
    """scores [B, V] -> scores whose argmax is each row's next token."""

    def __init__(self, rows: Sequence[Sampling]):
        self.drawing = [
            (index, row, torch.Generator().manual_seed(row.seed)) for index, row in enumerate(rows) if row.temperature
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.drawing:
            return scores
        scores = scores.float().clone()
        for index, row, generator in self.drawing:
            log_p = nucleus((scores[index] / row.temperature).log_softmax(-1), row.top_p)
            q = torch.empty(log_p.shape).exponential_(generator=generator).to(log_p.device)
            scores[index] = log_p - q.log()
        return scores


def nucleus(log_p: torch.Tensor, top_p: float) -> torch.Tensor:
    """log_p [V] with -inf outside the smallest set of likeliest tokens whose probabilities sum to at least top_p."""
    if top_p >= 1:
        return log_p
    ordered, places = log_p.sort(descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # the first is always kept
    return log_p.index_fill(0, places[before >= top_p], -torch.inf)


class RowEnds(StoppingCriteria):
    """Ends each row at its end-of-text token, at its own length, or when nobody waits for it, and reports it then.

    finished(row, tokens, reason): reason is "stop", "length" or "abandoned"; tokens are without the end-of-text token
    """

    def __init__(
        self,
        lengths: Sequence[int],
        end_ids: Iterable[int],
        is_abandoned: Callable[[int], bool],
        finished: Callable[[int, list[int], str], None],
    ):
        self.lengths, self.end_ids = list(lengths), set(end_ids)
        self.is_abandoned, self.finished = is_abandoned, finished
        self.written: list[list[int]] = [[] for _ in self.lengths]
        self.done = [False] * len(self.lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.done[row]:
                continue
            reason = self._reason(row, token)
            if reason != "stop":
                self.written[row].append(token)
                reason = reason or ("length" if len(self.written[row]) >= self.lengths[row] else None)
            if reason is not None:
                self.done[row] = True
                self.finished(row, self.written[row], reason)
        return torch.tensor(self.done, device=input_ids.device)

    def _reason(self, row: int, token: int) -> str | None:
        if self.is_abandoned(row):
            return "abandoned"
        return "stop" if token in self.end_ids else None
