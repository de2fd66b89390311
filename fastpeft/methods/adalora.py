"""AdaLoRA: LoRA in the form of a singular value decomposition, with ranks that training distributes over the modules
(Zhang et al. 2023, arXiv:2303.10512).
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.layers.adalora import AdaLoRALinear
from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import is_linear_base
from fastpeft.layers.rank_allocation import (
    BudgetSchedule,
    allocate,
    apply_pattern,
    forget_importance,
    orthogonality,
    update_importance,
)
from fastpeft.methods.lora import LoraConfig
from fastpeft.methods.targets import DEFAULT_TARGETS

_QV = ("q_proj", "v_proj")
ADALORA_TARGETS: dict[str, tuple[str, ...] | str] = {
    **DEFAULT_TARGETS,
    **dict.fromkeys(("llama", "llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "gptj", "gpt_neo"), _QV),
    **dict.fromkeys(("bart", "opt"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("gpt_neox", "bloom"), ("query_key_value",)),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "bert": ("query", "value"),
    "roberta": ("query", "key", "value", "dense"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}
"""Modules that are adapted by default, by `model.config.model_type`: PEFT's row for AdaLoRA, or LoRA's where there is none."""


@dataclass
class AdaLoraConfig(LoraConfig):
    """Options of AdaLoRA, by PEFT's names: those of LoRA except r, and the schedule of the ranks.

    A step of a training ends with model.update_and_allocate(step), after optimizer.step() and before zero_grad(); fastpeft's
    Trainer does it. total_step may stay None until then: `fastpeft train`, `finetune` and `train` fill in the run's length, but
    get_peft_model asks for it.
    Raises:  ValueError for a value outside its range, for a schedule without a step on which ranks fall, and for options of
             LoRA that change what AdaLoRA decomposes. What PEFT's AdaLoRA leaves unused is left unused, with a warning
    """

    peft_type: ClassVar[str] = "ADALORA"
    default_targets: ClassVar[dict[str, tuple[str, ...] | str]] = ADALORA_TARGETS
    shown_elsewhere: ClassVar[frozenset[str]] = LoraConfig.shown_elsewhere | {
        *(
            "r",
            "use_rslora",
            "alpha_pattern",
            "rank_pattern",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
        ),
        *("orth_reg_weight", "total_step"),
    }

    target_r: int = 8
    """Rank that is left of a module on the average."""
    init_r: int = 12
    """Rank of every module at the start."""
    tinit: int = 0
    """Steps before the ranks begin to fall."""
    tfinal: int = 0
    """Steps at the end in which the ranks stay as they are."""
    deltaT: int = 1
    """Steps between two allocations of the ranks."""
    beta1: float = 0.85
    """Share of the past in the running mean of the sensitivity."""
    beta2: float = 0.85
    """Share of the past in the running mean of its uncertainty."""
    orth_reg_weight: float = 0.5
    """Weight of the penalty that keeps the rows of A and the columns of B orthonormal; added to the loss in training."""
    total_step: int | None = None
    """Optimizer steps of the whole training; a training run fills in its own."""
    rank_pattern: dict[str, list[bool]] | None = None
    """Which triples of each module are left; the training writes it."""

    def __post_init__(self):
        pattern, self.rank_pattern = self.rank_pattern, {}  # LoRA's is one of ranks
        self._check_lora_options()
        super().__post_init__()
        self.rank_pattern = self._checked_pattern(pattern)
        for name in ("target_r", "init_r", "deltaT"):
            self._check(_is_whole(getattr(self, name), 1), name, "a whole number, at least 1")
        for name in ("tinit", "tfinal"):
            self._check(_is_whole(getattr(self, name), 0), name, "a whole number, at least 0")
        self._check(self.target_r <= self.init_r, "target_r", f"at most init_r={self.init_r}")
        for name in ("beta1", "beta2"):
            self._check(0 < getattr(self, name) < 1, name, "more than 0 and less than 1")
        self._check(self.orth_reg_weight >= 0, "orth_reg_weight", "at least 0")
        if self.total_step is not None:
            self._check(_is_whole(self.total_step, 1), "total_step", "a whole number, at least 1, or None")
            if self.tinit >= self.total_step - self.tfinal:
                raise ValueError(
                    f"AdaLoraConfig: expected tinit < total_step - tfinal, got tinit={self.tinit}, tfinal={self.tfinal}, "
                    f"total_step={self.total_step}; on no step would ranks fall: decrease tinit or tfinal, or train longer"
                )

    def _check(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"AdaLoraConfig: expected {name} {expected}, got {getattr(self, name)!r}")

    def _check_lora_options(self) -> None:
        for name in ("use_dora", "loftq_config", "target_parameters"):
            if getattr(self, name):
                raise ValueError(f"AdaLoraConfig: AdaLoRA has no {name}, got {getattr(self, name)!r}; leave it out")
        unused = {"r": 8, "use_rslora": False, "lora_bias": False, "eva_config": None}
        ignored = [name for name, default in unused.items() if getattr(self, name) != default]
        ignored += ["alpha_pattern"] if self.alpha_pattern else []
        if not isinstance(self.init_lora_weights, bool):
            ignored.append("init_lora_weights")
            self.init_lora_weights = bool(self.init_lora_weights)
        if ignored:
            warnings.warn(
                f"AdaLoraConfig: AdaLoRA does not use {', '.join(ignored)}; the rank at the start is init_r",
                stacklevel=4,
            )

    @staticmethod
    def _checked_pattern(pattern: Any) -> dict[str, list[bool]] | None:
        if not pattern:
            return None
        rows = pattern.values() if isinstance(pattern, Mapping) else [pattern]
        if not all(isinstance(row, list) and all(isinstance(kept, bool) for kept in row) for row in rows):
            raise ValueError(
                f"AdaLoraConfig: expected rank_pattern with a list of bools for each module, got {str(pattern)[:80]}; it is "
                "written by the training"
            )
        return {
            re.sub(r"\.lora_E\.[^.]+$", ".lora_E", key): row for key, row in pattern.items()
        }  # PEFT's may name the adapter

    # -- what the method does -------------------------------------------------------------------------------------------

    def for_run(self, steps: int) -> "AdaLoraConfig":
        if self.total_step is None:
            return dataclasses.replace(self, total_step=steps)
        if self.total_step - self.tfinal > steps:
            warnings.warn(
                f"AdaLoraConfig: the last allocation is at step {self.total_step - self.tfinal}, but the run ends at {steps}: "
                "the ranks will not fall to target_r",
                stacklevel=2,
            )
        return self

    def for_model(self, model: nn.Module) -> "AdaLoraConfig":
        if self.total_step is None:
            raise ValueError(
                "AdaLoraConfig: expected total_step, the number of optimizer steps of the whole training, got None; give it, or "
                "train with fastpeft's train or finetune, which know it"
            )
        return self

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        if not is_linear_base(module):
            raise ValueError(
                f"target_modules: expected nn.Linear or transformers' Conv1D, got {type(module).__name__} at {path}; AdaLoRA is "
                "for linear modules"
            )
        return AdaLoRALinear(
            module,
            r=self.init_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            adapter_name=adapter_name,
            init_lora_weights=self.init_lora_weights,
            frozen=self.inference_mode,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    # -- training -------------------------------------------------------------------------------------------------------

    def penalty(self, name: str, layers: Mapping[str, AdapterLayer]) -> torch.Tensor | None:
        mine = _trained(name, layers)
        return self.orth_reg_weight * orthogonality(mine, name) if mine and self.orth_reg_weight else None

    def after_step(self, name: str, layers: Mapping[str, AdapterLayer], step: int) -> None:
        mine = _trained(name, layers)
        if not mine:
            return
        schedule = BudgetSchedule(
            sum(layer.lora_E[name].shape[0] for layer in mine.values()),
            self.target_r * len(mine),
            self.tinit,
            self.tfinal,
            self.total_step,
            self.deltaT,
        )
        if step > schedule.last:
            if self.rank_pattern is not None:
                apply_pattern(mine, name, {key.removesuffix(".lora_E"): row for key, row in self.rank_pattern.items()})
            return
        if step < schedule.last or not any(name in layer.importance for layer in mine.values()):
            update_importance(mine, name, self.beta1, self.beta2)
        if schedule.allocates(step):
            pattern = allocate(mine, name, schedule.budget(step))
            self.rank_pattern = {f"{path}.lora_E": row for path, row in pattern.items()}
        if step == schedule.last:
            forget_importance(mine, name)

    # -- on disk --------------------------------------------------------------------------------------------------------

    def after_loading(self, saved: "AdaLoraConfig") -> "AdaLoraConfig":
        return dataclasses.replace(self, rank_pattern=saved.rank_pattern)

    def showing(self, tensors: dict[str, torch.Tensor]) -> "AdaLoraConfig":
        """A triple that came back since the last allocation is left too: the file computes what the model does."""
        if self.rank_pattern is None:
            return self
        pattern = {}
        for key, row in self.rank_pattern.items():
            e = tensors.get(self.key_prefix + key)
            alive = row if e is None else (e.detach().flatten() != 0).tolist()
            pattern[key] = [kept or other for kept, other in zip(row, alive, strict=True)]
        return dataclasses.replace(self, rank_pattern=pattern)

    def to_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Without the rows and columns that rank_pattern leaves out."""
        saved = dict(tensors)
        for key, row, dim in self._pruned():
            if key in saved:
                kept = torch.tensor(row, dtype=torch.bool, device=saved[key].device)
                saved[key] = saved[key][kept] if dim == 0 else saved[key][:, kept]
        return saved

    def from_disk(self, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With zeros for the rows and columns that rank_pattern leaves out."""
        full = dict(found)
        for key, row, dim in self._pruned():
            tensor = found.get(key)
            if tensor is None or key not in expected or tensor.dim() != 2 or tensor.shape[dim] != sum(row):
                continue
            if len(row) == expected[key].shape[dim]:
                shape = (len(row), tensor.shape[1]) if dim == 0 else (tensor.shape[0], len(row))
                full[key] = tensor.new_zeros(shape)
                full[key][torch.tensor(row, dtype=torch.bool) if dim == 0 else (slice(None), torch.tensor(row))] = (
                    tensor
                )
        return full

    def _pruned(self):
        """(name on disk, which rows or columns stay, the dimension that they are in) of each tensor."""
        for key, row in (self.rank_pattern or {}).items():
            path = self.key_prefix + key.removesuffix(".lora_E")
            yield from ((f"{path}.lora_A", row, 0), (f"{path}.lora_E", row, 0), (f"{path}.lora_B", row, 1))


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _trained(name: str, layers: Mapping[str, AdapterLayer]) -> dict[str, AdaLoRALinear]:
    """The modules in which AdaLoRA's adapter `name` is being trained."""
    return {
        path: layer
        for path, layer in layers.items()
        if isinstance(layer, AdaLoRALinear) and name in layer.lora_E and layer.lora_E[name].requires_grad
    }
