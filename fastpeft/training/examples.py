"""Held-out rows with the model's answers before and after training, for people to look at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from fastpeft.training.data import Columns
from fastpeft.training.metrics import class_probabilities


def spread_rows(count: int, wanted: int) -> list[int]:
    """`wanted` row numbers spread evenly over `count` rows."""
    return [] if wanted < 1 else np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def classification_examples(
    rows: Dataset, columns: Columns, labels: Sequence[str], targets: Sequence[int], before: np.ndarray | None,
    after: np.ndarray, wanted: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """{"text", "label", "before", "after", "probability"}; probability is that of the class in "after"."""
    probabilities = class_probabilities(after)
    shown = []
    for row in spread_rows(len(rows), wanted):
        example = {"text": str(rows[row][columns.text]), "label": labels[targets[row]]}
        if columns.text_pair:
            example["text_pair"] = str(rows[row][columns.text_pair])
        if before is not None:
            example["before"] = labels[int(before[row].argmax())]
        best = int(probabilities[row].argmax())
        shown.append(example | {"after": labels[best], "probability": float(probabilities[row, best])})
    return shown


def prompts_and_responses(rows: Dataset, columns: Columns, wanted: int) -> list[tuple[Any, str]]:
    """(prompt, expected response) of rows to show: of chat messages the last assistant turn, of plain text the second half."""
    pairs: list[tuple[Any, str]] = []
    for row in spread_rows(len(rows), wanted):
        values = rows[row]
        if columns.messages:
            messages = list(values[columns.messages])
            last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
            pairs.append((messages[:last], str(messages[last]["content"])))
        elif columns.response:
            pairs.append((str(values[columns.prompt]), str(values[columns.response])))
        else:
            words = str(values[columns.text]).split(" ")
            half = max(1, len(words) // 2)
            pairs.append((" ".join(words[:half]), " ".join(words[half:])))
    return pairs


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: chat messages as "role: content" lines."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
