"""A data config -> splits of rows, their columns and classes -> tokenised splits."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from fastpeft.training.config import DataConfig
from fastpeft.training.data import (
    MESSAGES_NAMES,
    PROMPT_NAMES,
    RESPONSE_NAMES,
    Columns,
    choose_columns,
    class_names,
    find_column,
    read_extra_splits,
    read_splits,
    require_columns,
    split_off_validation,
)
from fastpeft.training.labels import label_names
from fastpeft.training.record import CAUSAL_LM, CLASSIFICATION
from fastpeft.training.text_format import TextFormat
from fastpeft.training.tokenise import PreparedSplit, tokenise_causal_lm, tokenise_classification

HELD_OUT = ("test", "validation")


@dataclass
class RawData:
    """Splits of rows as they were read, what they are for, which columns are used, and the class names."""

    task: str
    splits: dict[str, Dataset]
    columns: Columns
    labels: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 of the columns that are used, of the class names, and of every row of every split in its order."""
        used = self.columns.used()
        found = hashlib.sha256(json.dumps([self.task, vars(self.columns), self.labels], sort_keys=True).encode())
        for name, split in sorted(self.splits.items()):
            found.update(f"{name} {len(split)}".encode())
            for row in split.select_columns(used):
                found.update(json.dumps([row[column] for column in used], default=str).encode())
        return found.hexdigest()

    def tokenise(self, tokenizer: Any, text_format: TextFormat) -> dict[str, PreparedSplit]:
        """Every split as token ids."""
        return {name: self._tokenise_split(name, split, tokenizer, text_format) for name, split in self.splits.items()}

    def _tokenise_split(self, name: str, split: Dataset, tokenizer: Any, text_format: TextFormat) -> PreparedSplit:
        if self.task == CLASSIFICATION:
            return tokenise_classification(split, self.columns, self.labels, tokenizer, text_format, name)
        return tokenise_causal_lm(split, self.columns, tokenizer, text_format, name)


def read_training_data(
    config: DataConfig,
    *,
    task: str | None,
    labels: tuple[str, ...],
    seed: int,
    splits: dict[str, Dataset] | None = None,
) -> RawData:
    """Train, validation and test rows of a config, with the validation rows split off if there are none.

    splits: the rows by split, where they are in memory already; then config.data is only their name

    Raises:  FileNotFoundError or ValueError naming the file, column or label that is wrong
    """
    if splits is None:
        splits = read_splits(config.data, config.validation_data, config.test_data)
    else:
        splits = {**splits, **read_extra_splits(config.validation_data, config.test_data)}
    if "train" not in splits:
        raise ValueError(f"data {config.data}: expected training rows, got only {sorted(splits)}")
    train = splits["train"]
    task = task or guess_task(config, train.column_names)
    columns = choose_columns(task, train.column_names, **config.wanted_columns())
    for name, split in splits.items():
        require_columns(name, split, columns)
    names: list[str] = []
    if task == CLASSIFICATION:
        names = label_names(train[columns.label], labels or class_names(train, columns.label) or ())
    if "validation" not in splits and config.validation_fraction > 0:
        train, splits["validation"] = split_off_validation(train, config.validation_fraction, seed, columns.label)
    splits["train"] = first_rows(train, config.max_train_rows)
    for name in set(splits) - {"train"}:
        splits[name] = first_rows(splits[name], config.max_eval_rows)
    return RawData(task, splits, columns, names)


def guess_task(config: DataConfig, names: list[str]) -> str:
    """classification if there is a label column and neither messages nor prompt and response, else causal_lm."""
    wanted = config.wanted_columns()
    if wanted["label"]:
        return CLASSIFICATION
    if wanted["messages"] or wanted["prompt"] or wanted["response"] or find_column(MESSAGES_NAMES, names):
        return CAUSAL_LM
    if find_column(PROMPT_NAMES, names) and find_column(RESPONSE_NAMES, names):
        return CAUSAL_LM
    try:
        choose_columns(CLASSIFICATION, names, text=wanted["text"])
    except ValueError:
        return CAUSAL_LM
    return CLASSIFICATION


def first_rows(dataset: Dataset, count: int | None) -> Dataset:
    """The first `count` rows, or all."""
    return dataset if count is None or count >= len(dataset) else dataset.select(range(count), keep_in_memory=True)


def sorted_by_length(features: Dataset) -> Dataset:
    """The rows from the shortest to the longest, so that evaluation batches have little padding."""
    lengths = features["length"][:]
    return features.select(sorted(range(len(features)), key=lengths.__getitem__), keep_in_memory=True)


def held_out_split(splits: dict[str, Any]) -> str | None:
    """The split that final metrics are computed on: test, else validation, else none."""
    return next((name for name in HELD_OUT if name in splits), None)
