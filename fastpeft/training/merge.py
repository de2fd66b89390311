"""Merging a trained adapter into a plain model on disk, and what that changed.

Weights are compared with W + update in float32, over the base that was merged into; logits with those of the adapter on its base
as it was trained. What is compared is what plain transformers reads from the new folder.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpeft.integrations.dequantize import dequantize
from fastpeft.integrations.transformers import DTYPES
from fastpeft.layers.base_weight import frozen_weight, is_conv1d, is_quantized, keep_model_unpacked
from fastpeft.training.config import Dtype, Quantization
from fastpeft.training.predict import TrainedAdapter, adapter_info
from fastpeft.training.record import CLASSIFICATION

Into = Literal["full", "dequantized"]
BUILT_IN_ROWS, BUILT_IN_LENGTH = 4, 16


@dataclass
class Difference:
    """largest |x - exact|, its rms, and that rms over the rms of what it is measured by."""

    largest: float = 0.0
    rms: float = 0.0
    relative_rms: float = 0.0


@dataclass
class MergeChange:
    """What merging changed. weights: of `tensors` tensors that the adapter changed or that were quantised, relative to their own
    rms; logits: on `rows` rows, relative to how far the adapter itself moves them."""

    weights: Difference
    tensors: int
    logits: Difference
    rows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        weights, logits = self.weights, self.logits
        return [
            f"weights: largest change {weights.largest:.3g}, rms {weights.rms:.3g} = {weights.relative_rms:.2%} of their rms, "
            f"in {self.tensors} tensors against W + update in float32",
            f"logits:  largest change {logits.largest:.3g}, rms {logits.rms:.3g} = {logits.relative_rms:.2%} of what the adapter "
            f"changes, on {self.rows} rows against the adapter as it was trained",
        ]


def merge_to_folder(
    adapter: str | Path,
    folder: str | Path,
    *,
    base_model: str | None = None,
    dtype: Dtype = "auto",
    into: Into = "full",
    quantize: Quantization = "none",
    texts: Sequence[str] = (),
    measure: bool = True,
    overwrite: bool = False,
) -> MergeChange | None:
    """Merge the adapter of a folder into its base and save a plain transformers model with its tokenizer in `folder`.

    into      "full": the base's weights as they are on disk; "dequantized": what the quantised base of its training stood for
    quantize  what the sum is quantised to: an ordinary quantised model, without the adapter's precision
    texts     rows for the logits; default: four rows of tokens drawn from a seed
    measure   compare (reads both models once more); else None comes back
    Raises:   ValueError, OSError with a one-line reason; the folder is then as it was
    """
    into_trained = into == "dequantized"
    trained = adapter_info(adapter, base_model).config.get("quantization", "none")
    if into_trained and trained == "none":
        raise ValueError(
            f"merge: expected an adapter that was trained on a quantised base, got {adapter}; merge into full"
        )

    def load(dtype: Dtype, *, full: bool) -> TrainedAdapter:
        return TrainedAdapter.load(adapter, base_model=base_model, dtype=dtype, use_cpu=True, full_weights=full)

    change: list[MergeChange] = []

    def check(draft: Path) -> None:
        change.append(_measured(load("float32", full=False), into_trained, trained, load, draft, texts))

    whole = load("auto" if into_trained else dtype, full=not into_trained)
    wanted = None if dtype == "auto" else DTYPES[dtype]
    if into_trained:  # quantised from what it was in training: weights that are rounded first quantise to others
        dequantize(whole.model, wanted and torch.float32)
    options = {"dtype": wanted, "quantization": quantize, "overwrite": overwrite}
    whole.save_merged(folder, **options, check=check if measure else None)
    return change[0] if change else None


def _measured(
    as_trained: TrainedAdapter, into_trained: bool, trained: str, load: Any, draft: Path, texts: Sequence[str]
) -> MergeChange:
    rows = _rows(as_trained, texts)
    before = _logits(as_trained.model, rows)
    with as_trained.model.disable_adapter():
        moved = before - _logits(as_trained.model, rows)
    if into_trained:
        dequantize(as_trained.model, torch.float32)
    exact = as_trained if into_trained or trained == "none" else load("float32", full=True)
    touched = [path for path, _ in exact.model.base_model.layers()]
    merged = exact.model.merge_and_unload(safe_merge=True)
    auto = AutoModelForSequenceClassification if as_trained.info.task == CLASSIFICATION else AutoModelForCausalLM
    saved = auto.from_pretrained(draft, dtype=torch.float32).eval()
    keep_model_unpacked(saved)
    weights, tensors = _weights(merged, saved, touched)
    logits = _logits(saved, rows) - before
    return MergeChange(weights, tensors, _difference([(logits, moved)]), len(rows))


def _rows(adapter: TrainedAdapter, texts: Sequence[str]) -> list[torch.Tensor]:
    """Token rows [1, S]."""
    if texts:
        return [adapter.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    vocabulary = min(adapter.model.get_base_model().get_input_embeddings().num_embeddings, len(adapter.tokenizer))
    drawn = torch.randint(vocabulary, (BUILT_IN_ROWS, BUILT_IN_LENGTH), generator=torch.Generator().manual_seed(0))
    return list(drawn.split(1))


@torch.no_grad()
def _logits(model: nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    """The logits of all rows, flat, in float64."""
    return torch.cat([model(input_ids=row).logits.double().flatten() for row in rows])


@torch.no_grad()
def _weights(exact: nn.Module, saved: nn.Module, touched: list[str]) -> tuple[Difference, int]:
    """Over the parameters under the paths `touched`, and those that are quantised in `saved`."""
    names = [name for name, _ in exact.named_parameters() if _is_touched(saved, name, touched)]
    exacts = ((name, exact.get_parameter(name).double()) for name in names)  # one tensor's copies at a time
    return _difference((_saved(exact, saved, name) - weight, weight) for name, weight in exacts), len(names)


def _is_touched(saved: nn.Module, name: str, touched: list[str]) -> bool:
    path, _, leaf = name.rpartition(".")
    quantized = leaf == "weight" and is_quantized(saved.get_submodule(path))
    return quantized or any(f"{name}.".startswith(f"{prefix}.") for prefix in touched)


def _saved(exact: nn.Module, saved: nn.Module, name: str) -> torch.Tensor:
    """The parameter as the folder has it, in float64, dequantised."""
    path, _, leaf = name.rpartition(".")
    owner = saved.get_submodule(path)
    if leaf == "weight" and is_quantized(owner):
        weight = frozen_weight(owner).dequantize(torch.float32).double()
        return weight.t() if is_conv1d(exact.get_submodule(path)) else weight
    return saved.get_parameter(name).double()


def _difference(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Difference:
    """Of (x - exact, what its rms is relative to)."""
    largest, squares, scale, count = 0.0, 0.0, 0.0, 0
    for error, measure in pairs:
        largest = max(largest, error.abs().max().item())
        squares += error.square().sum().item()
        scale += measure.square().sum().item()
        count += error.numel()
    if not count:
        return Difference()
    return Difference(largest, math.sqrt(squares / count), math.sqrt(squares / scale) if scale else 0.0)
