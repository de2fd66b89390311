"""What one training run did: the numbers behind the JSON line, the report and later comparisons."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

CLASSIFICATION = "classification"
CAUSAL_LM = "causal_lm"
TASKS = (CLASSIFICATION, CAUSAL_LM)


@dataclass
class RunRecord:
    """One run, JSON-serialisable in every field.

    Units: seconds wall clock, cpu_seconds of this process over all threads, peak_memory_mb in 10^6 bytes,
    adapter_bytes in bytes; accuracy, f1, precision, recall, roc_auc in 0..1; loss in nats.

    data_hash    SHA-256 of every split's rows, columns and class names, before they are cut to tokens
    train_seconds, train_tokens, tokens_per_second: of the training steps of this call, without evaluations; the tokens are those
                 of the rows without padding, and of a resumed run only those after the checkpoint
    data         split name -> {"rows", "truncated_rows", "truncated_tokens", "empty_rows", ...}
    peft_config  the adapter's config as PEFT writes it; training the hyperparameters
    base         how the base model is held: {"quantization", "bytes", "blocksize", "double_quant"}; bytes in memory, of which
                 {"process_bytes"} in rank 0 where it is sharded
    acceleration {"float32_products": how they were taken}, and of an accelerated training {"memory", "offload", "summary": the
                 lines of its report after the last step}
    baseline     metrics on the held-out set before training, {} if not asked for; metrics: the same after it
    history      what the Trainer logged, one dict a line: step, epoch, loss, learning_rate, grad_norm or eval_*
    confusion    rows: true label, columns: predicted label, in the order of `labels`
    roc          {"fpr": [...], "tpr": [...], "auc": float} of a binary task; baseline_roc: before training
    examples     {"text" or "prompt", "label" or "response", "before", "after", "probability", ...} a row
    """

    title: str
    task: str
    model: str
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    data_hash: str = ""
    peft_config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int = 0
    total_parameters: int = 0
    base: dict[str, Any] = field(default_factory=dict)
    acceleration: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""
    adapter_bytes: int = 0
    baseline: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    train_seconds: float = 0.0
    train_tokens: int = 0
    tokens_per_second: float = 0.0
    labels: list[str] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    roc: dict[str, Any] | None = None
    baseline_roc: dict[str, Any] | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"RunRecord: expected task in {list(TASKS)}, got {self.task!r}")

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON types; a number that is not finite becomes None, as JSON has no NaN."""
        return plain_json(asdict(self))

    def save(self, path: str | os.PathLike) -> Path:
        """Write the record as JSON to `path`, through a temporary name, and return the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".partial")
        draft.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RunRecord":
        """Read what `save` wrote. Raises FileNotFoundError or ValueError with a one-line reason."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"run record {path}: expected JSON, got {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"run record {path}: expected a JSON object, got {type(values).__name__}")
        known = {item.name for item in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted({"title", "task", "model"} - set(values))
        if unknown or missing:
            raise ValueError(f"run record {path}: unknown fields {unknown}, missing fields {missing}")
        return cls(**values)

    def summary(self) -> dict[str, Any]:
        """The flat object the command line prints as its last line."""
        result = {"task": self.task, **self.metrics}
        result |= {f"baseline_{name}": value for name, value in self.baseline.items()}
        result |= {
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
            **{f"base_{name}": self.base[name] for name in ("quantization", "bytes") if name in self.base},
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "adapter": self.adapter,
        }
        return plain_json(result)


def plain_json(value: Any) -> Any:
    """Copy of `value` with sets sorted to lists, tuples as lists, paths as text, non-finite floats as None."""
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain_json(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if hasattr(value, "item"):
        return plain_json(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
