"""Using a trained adapter: load it with its base model, evaluate it on labelled rows, predict for new ones, merge it."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from fastpeft.checkpoint import read_config, read_tensors
from fastpeft.integrations.transformers import align_padding, load_tokenizer, longest_input
from fastpeft.methods.config import HEAD_NAMES
from fastpeft.model import PeftModel
from fastpeft.ops.fast_matmul import fast_float32_matmul
from fastpeft.training.base_model import load_base, quantize_in_place
from fastpeft.training.config import DEFAULT_MAX_LENGTH, TASK_TYPES, BaseOptions, Quantization
from fastpeft.training.data import choose_columns, require_columns
from fastpeft.training.evaluate import Evaluator
from fastpeft.training.metrics import causal_lm_metrics, class_probabilities, classification_metrics
from fastpeft.training.record import CLASSIFICATION
from fastpeft.training.run_folder import INFO_FILE, TrainingInfo
from fastpeft.training.text_format import TextFormat
from fastpeft.training.tokenise import (
    SplitReport,
    encode_prompts,
    encode_texts,
    tokenise_causal_lm,
    tokenise_classification,
)


@dataclass
class TrainedAdapter:
    """An adapter on its base model, with the tokenizer and what is known of its training."""

    folder: Path
    model: PeftModel
    tokenizer: Any
    info: TrainingInfo

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base_model: str | None = None,
        dtype: str = "auto",
        use_cpu: bool = False,
        full_weights: bool = False,
    ) -> "TrainedAdapter":
        """The adapter of `folder` on `base_model`, by default the one it was trained on. Adapters saved by PEFT work too.

        full_weights: read the base model in full, also where it was quantised in training
        Raises:  FileNotFoundError, ValueError, NotImplementedError with a one-line reason
        """
        info = adapter_info(folder, base_model)
        labels = info.labels if info.task == CLASSIFICATION else ()
        tokenizer = load_tokenizer(info.model)
        device = "cpu" if use_cpu or not torch.cuda.is_available() else "cuda"
        options = BaseOptions(dtype=dtype) if full_weights else BaseOptions.as_trained(info.config, dtype)
        base = load_base(info.model, options, labels=labels, device=device)
        align_padding(base, tokenizer)
        model = PeftModel.from_pretrained(base, folder)
        model.to(device)
        return cls(Path(folder), model, tokenizer, info)

    def evaluate(
        self, rows: Dataset, *, batch_size: int = 32, bf16: bool = False, columns: dict[str, str | None] | None = None
    ) -> tuple[dict[str, float], SplitReport]:
        """Metrics over labelled rows (a Dataset), and how many were used and cut.

        Columns are those of the training data where the rows have them, else found by name; `columns` overrides by role.
        """
        chosen = self._columns(rows.column_names, columns or {})
        require_columns("evaluation", rows, chosen)
        text_format, evaluator = self._text_format(), self._evaluator(batch_size, bf16)
        with fast_float32_matmul(evaluator.device):
            if self.info.task == CLASSIFICATION:
                split = tokenise_classification(
                    rows, chosen, self.info.labels, self.tokenizer, text_format, "evaluation"
                )
                logits = evaluator.class_logits(split.features)
                return classification_metrics(logits, np.asarray(split.features["labels"])), split.report
            split = tokenise_causal_lm(rows, chosen, self.tokenizer, text_format, "evaluation")
            return causal_lm_metrics(evaluator.token_scores(split.features)), split.report

    def classify(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        batch_size: int = 32,
        bf16: bool = False,
        progress: bool = True,
    ) -> list[dict[str, Any]]:
        """{"label", "probability", "probabilities"} for every text (or pair), in order."""
        features, _ = encode_texts(
            list(texts), list(pairs) if pairs else None, self.tokenizer, self._text_format().max_length
        )
        evaluator = self._evaluator(batch_size, bf16, progress)
        with fast_float32_matmul(evaluator.device):
            probabilities = class_probabilities(evaluator.class_logits(Dataset.from_dict(features), "predict"))
        return [
            {
                "label": self.info.labels[int(row.argmax())],
                "probability": float(row.max()),
                "probabilities": dict(zip(self.info.labels, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        bf16: bool = False,
        progress: bool = True,
    ) -> list[str]:
        """The greedy response to every prompt (a text, or chat messages), in order."""
        ids = encode_prompts(prompts, self.tokenizer, self._text_format())
        return self._evaluator(batch_size, bf16, progress).responses(ids, max_new_tokens, "predict")

    def save_merged(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        dtype: torch.dtype | None = None,
        quantization: Quantization = "none",
        check: Callable[[Path], None] | None = None,
    ) -> Path:
        """Merge the adapter into the base weights and save a plain transformers folder with the tokenizer.

        Everything is written under a temporary name first. The adapter is used up: this object has no adapter afterwards.
        dtype: what the merged weights are rounded to (None: the base's); quantization: what they are then quantised to
        check: called with the finished folder before it takes its place
        Raises:  FileExistsError if the folder holds anything and overwrite is not set; OSError if it cannot be written
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
            raise FileExistsError(f"output folder {folder}: exists and is not empty; use another, or --overwrite it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _replaced(folder) as draft:
            merged = self.model.merge_and_unload(safe_merge=True)
            merged = merged if dtype is None else merged.to(dtype)
            merged = quantize_in_place(merged, BaseOptions(quantization=quantization))
            merged.save_pretrained(draft)
            self.tokenizer.save_pretrained(draft)
            if check is not None:
                check(draft)
        return folder

    def _columns(self, names: Sequence[str], overrides: dict[str, str | None]) -> Any:
        trained = vars(self.info.columns)
        wanted = {role: name for role, name in trained.items() if name in names}
        return choose_columns(
            self.info.task, names, **wanted | {role: name for role, name in overrides.items() if name}
        )

    def _text_format(self) -> TextFormat:
        longest = longest_input(self.model.config) or self.info.text_format.max_length
        longest -= getattr(self.model.active_peft_config, "num_virtual_tokens", 0)
        if longest >= self.info.text_format.max_length:
            return self.info.text_format
        return TextFormat(**vars(self.info.text_format) | {"max_length": longest})

    def _evaluator(self, batch_size: int, bf16: bool, progress: bool = True) -> Evaluator:
        return Evaluator(self.model, self.tokenizer, batch_size=batch_size, bf16=bf16, progress=progress)


def adapter_info(folder: str | Path, base_model: str | None = None) -> TrainingInfo:
    """What is known of an adapter's training: its fastpeft_training.json, else what its own two files say.

    An adapter saved by PEFT names no classes: they become "0", "1", ... as many as its head has rows.
    """
    config = read_config(folder)
    if (Path(folder) / INFO_FILE).is_file():
        info = TrainingInfo.load(folder)
        info.model = base_model or info.model
        return info
    tasks = {kind: task for task, kind in TASK_TYPES.items()}
    if config.get("task_type") not in tasks:
        raise ValueError(
            f"adapter {folder}: expected task_type one of {sorted(tasks)}, got {config.get('task_type')!r}"
        )
    task = tasks[config["task_type"]]
    model = base_model or config.get("base_model_name_or_path")
    if not model:
        raise ValueError(f"adapter {folder}: it does not name its base model; give it with --model")
    labels = _numbered_labels(folder) if task == CLASSIFICATION else []
    return TrainingInfo(task, model, labels, text_format=TextFormat(max_length=DEFAULT_MAX_LENGTH))


def _numbered_labels(folder: str | Path) -> list[str]:
    names = HEAD_NAMES["SEQ_CLS"]
    shapes = {name: tensor.shape for name, tensor in read_tensors(folder).items() if name.endswith(".weight")}
    heads = [shape for name, shape in shapes.items() if any(f".{head}." in name for head in names)]
    if not heads:
        raise ValueError(f"adapter {folder}: expected a classification head ({' or '.join(names)}), got none")
    return [
        str(label) for label in range(min(shape[0] for shape in heads))
    ]  # before the last layer there are more rows


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place at the end; if something fails it is removed and nothing changes."""
    draft = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        yield draft
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
