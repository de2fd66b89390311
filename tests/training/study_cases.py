"""A tiny classifier, a tiny causal model and reviews for the tests of studies."""

from pathlib import Path
from typing import Any

from tests.training import tiny

BASE = {
    "use_cpu": True, "report": False, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 2e-2,
    "per_device_train_batch_size": 8, "examples": 1, "max_new_tokens": 2, "cpu_fast_matmul": False,
}  # fmt: skip
FEW = {"resamples": 200}


def write_files(folder: Path) -> Path:
    """bert/, llama/ and reviews/ in `folder`."""
    tiny.bert(folder / "bert", layers=1)
    tiny.llama(folder / "llama")
    (folder / "reviews").mkdir()
    for split, count, seed in (("train", 40, 0), ("validation", 16, 1), ("test", 30, 2)):
        tiny.write_jsonl(folder / f"reviews/{split}.jsonl", tiny.reviews(count, seed))
    return folder


def reviews(files: Path, **more: Any) -> dict[str, Any]:
    """A study of two methods and two seeds on the reviews, with sections replaced."""
    values = {"model": str(files / "bert"), "data": str(files / "reviews"), "base": dict(BASE), "statistics": FEW}
    return values | {"methods": ["lora", "bitfit"], "grid": {"seed": [0, 1]}} | more
