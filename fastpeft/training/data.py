"""Rows for training from JSONL, CSV, Parquet or a dataset folder: reading, splitting, choosing columns.

Files are read whole into memory as a `datasets.Dataset`; nothing is cached on disk. Every error names the file, what was
expected and what is there.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, load_from_disk

from fastpeft.training.record import CAUSAL_LM, CLASSIFICATION

SPLITS = ("train", "validation", "test")
_SPLIT_STEMS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

TEXT_NAMES = ("text", "sentence", "review", "content", "document", "sentence1", "premise", "question")
PAIR_NAMES = ("text_pair", "sentence2", "hypothesis")
LABEL_NAMES = ("label", "labels", "sentiment", "class", "category", "target")
PROMPT_NAMES = ("prompt", "instruction", "question", "input", "source")
RESPONSE_NAMES = ("response", "completion", "output", "answer", "target", "summary")
MESSAGES_NAMES = ("messages", "conversation", "conversations")


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None where the data has no such part.

    Classification uses text, optionally text_pair, and label; a causal LM uses messages, or prompt and response, or text.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: str | None = None

    def used(self) -> list[str]:
        """The names of the columns that are used, in the order of the fields."""
        return [name for name in vars(self).values() if name is not None]


def read_table(path: str | Path) -> Dataset:
    """One .jsonl, .json, .csv, .tsv or .parquet file as a Dataset.

    Raises:  FileNotFoundError naming the files that are there; ValueError for an unknown kind, no rows, or a bad line
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path}: no such file; {_listing(path.parent)}")
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"data file {path}: expected one of {sorted(_READERS)}, got {path.suffix or 'no suffix'!r}")
    try:
        table = _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {path}: expected UTF-8 text, got {error}") from error
    if not len(table):
        raise ValueError(f"data file {path}: expected at least one row, got none")
    return table


def read_splits(data: str | Path, validation_data: str | Path | None = None, test_data: str | Path | None = None):
    """{"train": Dataset, ...} from a file or a folder, with the other splits from their own files where given.

    A folder holds what `Dataset.save_to_disk` / `DatasetDict.save_to_disk` wrote, or files named train, validation (valid,
    val, dev) and test. A file, or a single saved Dataset, is the train split.
    """
    path = Path(data)
    splits = _read_folder(path) if path.is_dir() else {"train": read_table(path)}
    return {**splits, **read_extra_splits(validation_data, test_data)}


def read_extra_splits(validation_data: str | Path | None, test_data: str | Path | None) -> dict[str, Dataset]:
    """The splits that have a file of their own."""
    named = {"validation": validation_data, "test": test_data}
    return {name: read_table(path) for name, path in named.items() if path is not None}


def split_off_validation(train: Dataset, fraction: float, seed: int, stratify_by: str | None = None):
    """(train, validation): `fraction` of the rows, at least one, drawn by `seed`; alike in labels where that is possible."""
    if len(train) < 2:
        raise ValueError(f"validation split: expected at least 2 rows to split, got {len(train)}; pass validation_data")
    held_out = min(max(1, round(len(train) * fraction)), len(train) - 1)
    if stratify_by is None:
        parts = train.train_test_split(test_size=held_out, seed=seed, keep_in_memory=True)
        return parts["train"], parts["test"]
    return _stratified_split(train, held_out, seed, stratify_by)


def choose_columns(task: str, names: Sequence[str], **wanted: str | None) -> Columns:
    """The columns `task` uses out of `names`; `wanted` overrides by field of Columns, the rest is found by usual names.

    Raises:  ValueError listing the columns there are, for a wanted one that is missing or where none of the usual is there
    """
    for role, name in wanted.items():
        if name is not None and name not in names:
            raise ValueError(f"{role} column: expected one of {list(names)}, got {name!r}")
    found = _choose_classification if task == CLASSIFICATION else _choose_causal_lm
    if task not in (CLASSIFICATION, CAUSAL_LM):
        raise ValueError(f"task: expected {CLASSIFICATION!r} or {CAUSAL_LM!r}, got {task!r}")
    return found(list(names), {role: name for role, name in wanted.items() if name is not None})


def require_columns(split: str, dataset: Dataset, columns: Columns, optional: Sequence[str] = ()) -> None:
    """Raise ValueError if `dataset` lacks a column that is used, apart from the `optional` roles."""
    needed = [name for role, name in vars(columns).items() if name is not None and role not in optional]
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise ValueError(f"{split} data: expected columns {needed}, got {dataset.column_names}; missing {missing}")


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """The label names a saved Dataset carries in a ClassLabel feature, or None."""
    feature = dataset.features[column]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def find_column(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    """The first candidate that is a name, letter case aside."""
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[candidate] for candidate in candidates if candidate in by_lower), None)


def _choose_classification(names: list[str], wanted: dict[str, str]) -> Columns:
    text = wanted.get("text") or find_column(TEXT_NAMES, names)
    label = wanted.get("label") or find_column(LABEL_NAMES, names)
    if text is None or label is None:
        missing = "text" if text is None else "label"
        usual = TEXT_NAMES if text is None else LABEL_NAMES
        raise ValueError(
            f"classification data: expected a {missing} column (any of {list(usual)}), got columns {names}; "
            f"name it with {missing}_column"
        )
    return Columns(text=text, text_pair=wanted.get("text_pair") or find_column(PAIR_NAMES, names), label=label)


def _choose_causal_lm(names: list[str], wanted: dict[str, str]) -> Columns:
    if "messages" in wanted:
        return Columns(messages=wanted["messages"])
    if "prompt" in wanted or "response" in wanted:
        return _prompt_columns(names, wanted)
    if "text" in wanted:
        return Columns(text=wanted["text"])
    messages = find_column(MESSAGES_NAMES, names)
    if messages is not None:
        return Columns(messages=messages)
    if find_column(RESPONSE_NAMES, names) is not None and find_column(PROMPT_NAMES, names) is not None:
        return _prompt_columns(names, wanted)
    text = find_column(TEXT_NAMES, names)
    if text is None:
        raise ValueError(
            "causal LM data: expected a column 'messages', or 'prompt' and 'response', or 'text', "
            f"got columns {names}; name them with messages_column, prompt_column and response_column, or text_column"
        )
    return Columns(text=text)


def _prompt_columns(names: list[str], wanted: dict[str, str]) -> Columns:
    prompt = wanted.get("prompt") or find_column(PROMPT_NAMES, names)
    response = wanted.get("response") or find_column(RESPONSE_NAMES, names)
    if prompt is None or response is None:
        missing = "prompt" if prompt is None else "response"
        raise ValueError(
            f"causal LM data: expected a {missing} column, got columns {names}; name it with {missing}_column"
        )
    return Columns(prompt=prompt, response=response)


def _read_folder(folder: Path) -> dict[str, Dataset]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = load_from_disk(str(folder), keep_in_memory=True)
        if isinstance(saved, DatasetDict):
            return {_split_of(name) or name: split for name, split in saved.items()}
        return {"train": saved}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _READERS)
    splits: dict[str, Dataset] = {}
    for path in files:
        split = _split_of(path.stem)
        if split is not None and split in splits:
            raise ValueError(f"data folder {folder}: two files for the {split} split; {_listing(folder)}")
        if split is not None:
            splits[split] = read_table(path)
    if not splits:
        raise FileNotFoundError(
            f"data folder {folder}: expected a saved dataset, or train / validation / test files "
            f"({', '.join(sorted(_READERS))}); {_listing(folder)}"
        )
    return splits


def _split_of(stem: str) -> str | None:
    """The split a file or saved split is named for: "train-00000-of-00001", "reviews_dev", ... or None."""
    words = stem.lower().replace("-", "_").replace(".", "_").split("_")
    return next((split for split, names in _SPLIT_STEMS.items() if any(word in names for word in words)), None)


def _stratified_split(train: Dataset, held_out: int, seed: int, column: str) -> tuple[Dataset, Dataset]:
    """Hold out every k-th row of a shuffled, label-sorted order: every label in proportion, for any number of rows."""
    labels = [str(value) for value in train[column]]
    shuffled = Dataset.from_dict({"row": range(len(train))}).shuffle(seed=seed, keep_in_memory=True)["row"]
    order = sorted(shuffled, key=lambda row: labels[row])
    step = len(order) / held_out
    chosen = {order[int((index + 0.5) * step)] for index in range(held_out)}
    kept = [row for row in range(len(train)) if row not in chosen]
    return train.select(kept, keep_in_memory=True), train.select(sorted(chosen), keep_in_memory=True)


def _read_json_lines(path: Path) -> Dataset:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_json_row(line, f"data file {path}, line {number}"))
    return _from_rows(rows, path)


def _read_json(path: Path) -> Dataset:
    text = path.read_text(encoding="utf-8-sig").lstrip()
    if not text.startswith("["):
        return _read_json_lines(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data file {path}: expected JSON, got {error}") from error
    bad = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if bad is not None:
        raise ValueError(f"data file {path}, row {bad}: expected an object, got {type(rows[bad]).__name__}")
    return _from_rows(rows, path)


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, got {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _from_rows(rows: list[dict[str, Any]], path: Path) -> Dataset:
    """A Dataset of all columns of all rows; a column of mixed plain types becomes text, an absent value None."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and kinds <= {str, int, float, bool}:
            values = [None if value is None else str(value) for value in values]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"data file {path}, column {name!r}: values of different types: {error}") from error
    return Dataset(pa.table(columns))


def _read_csv(path: Path, delimiter: str = ",") -> Dataset:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            rows = [row for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"data file {path}, line {reader.line_num}: {error}") from error
    if not rows:
        return Dataset.from_dict({})
    header, body = rows[0], rows[1:]
    uneven = next((index for index, row in enumerate(body, 1) if len(row) != len(header)), None)
    if uneven is not None:
        got = len(body[uneven - 1])
        raise ValueError(f"data file {path}, row {uneven}: expected {len(header)} fields {header}, got {got}")
    return Dataset.from_dict({name: [row[index] for row in body] for index, name in enumerate(header)})


def _read_tsv(path: Path) -> Dataset:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: Path) -> Dataset:
    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"data file {path}: expected Parquet, got {error}") from error


_READERS: dict[str, Callable[[Path], Dataset]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _listing(folder: Path, limit: int = 12) -> str:
    """What a folder holds, for an error message."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir())
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"{folder} holds {', '.join(names[:limit]) or 'nothing'}{more}"
