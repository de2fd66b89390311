"""fastpeft predict."""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

SORTED_BATCHES = 8
"""Batches of texts to classify that are sorted by length together and written at once; responses are written batch by batch."""


@dataclass(kw_only=True)
class PredictConfig:
    """Labels or responses of an adapter, as JSON lines: into a file, or on standard output before the results.

    A file grows batch by batch. Started again after it was cut off, the same command goes on after its last complete row."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to classify, or prompts to answer."""
    adapter: str
    """Folder of the adapter."""
    input: str | None = None
    """File with rows (.jsonl, .json, .csv, .tsv, .parquet) instead of texts."""
    output: str | None = None
    """File for the JSON lines; every row of the input with its prediction."""
    overwrite: bool = False
    """Replace the output file."""
    column: str | None = None
    """Column of the input with the text or prompt; default: as in training."""
    model: str | None = None
    """Base model, if it is not where it was in training."""
    max_new_tokens: int = 64
    """Longest response, in tokens."""
    batch_size: int = 16
    """Rows of a batch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model's weights; auto: as saved."""
    bf16: bool = False
    """Compute in bfloat16 (autocast)."""
    use_cpu: bool = False
    """Stay on the CPU even if there is a GPU."""

    def __post_init__(self) -> None:
        if bool(self.texts) == bool(self.input):
            raise ValueError(f"predict: expected either texts or --input, got {'both' if self.texts else 'neither'}")
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("predict: expected batch_size and max_new_tokens of at least 1")


CONFIG = PredictConfig


def run(config: PredictConfig, results: TextIO) -> dict:
    """Predict, write the JSON lines batch by batch, and return how many there are."""
    from tqdm.auto import tqdm

    from fastpeft.training.data import read_table
    from fastpeft.training.growing_file import GrowingFile
    from fastpeft.training.measure import Stopwatch
    from fastpeft.training.predict import TrainedAdapter
    from fastpeft.training.record import CLASSIFICATION

    clock = Stopwatch()
    if config.output is not None:
        _check_output(Path(config.output), config.overwrite)
    table = read_table(config.input) if config.input else None
    adapter = TrainedAdapter.load(config.adapter, base_model=config.model, dtype=config.dtype, use_cpu=config.use_cpu)
    classify = adapter.info.task == CLASSIFICATION
    if table is None:
        rows: list[dict[str, Any]] = [{"text" if classify else "prompt": text} for text in config.texts]
        inputs, pairs = list(config.texts), None
    else:
        rows = list(table)
        inputs, pairs = _inputs(table, adapter.info.columns, config.column, classify)

    output = None
    if config.output is not None:
        output = GrowingFile(config.output, _made_of(config, adapter.info.model), overwrite=config.overwrite)
    done = 0 if output is None else output.done
    if done:
        print(f"{config.output} has {done} of {len(rows)} rows; going on after them", file=sys.stderr)
    step = config.batch_size * (SORTED_BATCHES if classify else 1)
    try:
        with tqdm(total=len(rows), initial=done, desc="predict", unit="row") as bar:
            for start in range(done, len(rows), step):
                part = slice(start, start + step)
                found = _predictions(adapter, inputs[part], pairs and pairs[part], config, classify)
                answered = [row | answer for row, answer in zip(rows[part], found, strict=True)]
                if output is not None:
                    output.append(answered)
                else:
                    results.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in answered)
                bar.update(len(answered))
        if output is not None:
            output.finish()
    finally:
        if output is not None:
            output.close()
    return {
        "task": adapter.info.task,
        "rows": len(rows),
        "resumed_after": done,
        "output": config.output,
        "seconds": round(clock.seconds(), 3),
        "adapter": config.adapter,
    }


def _predictions(adapter: Any, inputs: list, pairs: list | None, config: PredictConfig, classify: bool) -> list[dict]:
    options = {"batch_size": config.batch_size, "bf16": config.bf16, "progress": False}
    if classify:
        return [{"prediction": row.pop("label"), **row} for row in adapter.classify(inputs, pairs, **options)]
    texts = adapter.generate(inputs, max_new_tokens=config.max_new_tokens, **options)
    return [{"prediction": text} for text in texts]


def _made_of(config: PredictConfig, model: str) -> dict[str, Any]:
    """What the rows of an output depend on: it goes on only with the same."""
    from fastpeft.training.growing_file import digest

    files = sorted(path for path in Path(config.adapter).iterdir() if path.name.startswith(("adapter_", "fastpeft_")))
    texts = hashlib.sha256(json.dumps(config.texts).encode()).hexdigest()
    return {
        "input": digest(config.input) if config.input else texts,
        "adapter": digest(*files),
        "base model": model,
        "column": config.column,
        "max_new_tokens": config.max_new_tokens,
        "dtype": config.dtype,
        "bf16": config.bf16,
    }


def _inputs(table: Any, trained: Any, wanted: str | None, classify: bool) -> tuple[list[Any], list[str] | None]:
    """The texts or prompts of a table, and the second texts of pairs."""
    from fastpeft.training.data import TEXT_NAMES, find_column

    names = table.column_names
    usual = (trained.text,) if classify else (trained.prompt, trained.messages, trained.text)
    name = wanted or next((name for name in usual if name in names), None)
    name = name or find_column(TEXT_NAMES if classify else ("prompt", "messages", "text"), names)
    if name not in names:
        raise ValueError(f"predict: expected column {name or usual[0] or 'text'!r}, got {names}; name it with --column")
    if name == trained.messages or (not classify and name == "messages"):
        return [_before_answer(messages) for messages in table[name]], None
    pairs = [str(text) for text in table[trained.text_pair]] if trained.text_pair in names and classify else None
    return ["" if text is None else str(text) for text in table[name]], pairs


def _before_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Chat messages up to the assistant's last turn, if that ends them."""
    ends_answered = bool(messages) and messages[-1]["role"] == "assistant"
    return messages[:-1] if ends_answered else messages


def _check_output(path: Path, overwrite: bool) -> None:
    """What can be refused before the model is read."""
    from fastpeft.training.growing_file import unfinished_note

    if path.exists() and not overwrite and not unfinished_note(path).exists():
        raise FileExistsError(f"output {path}: the file exists; use another name or --overwrite")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise NotADirectoryError(f"output {path}: expected a folder that can be written, got {path.parent}")
