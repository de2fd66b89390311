"""What LoRA on a linear and LoRA on an embedding have in common: ranks, scales, and the dtype of new tensors."""

import math
import numbers

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.linear_adapter import check_adapter_name


def lora_scale(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """s = alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def check_rank(where: str, r: int, lora_alpha: float, lora_dropout: float) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"{where}: expected rank r >= 1, got r={r!r}; a common choice is 16")
    if not _is_number(lora_dropout) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"{where}: expected 0 <= lora_dropout < 1, got {lora_dropout!r}")
    if not _is_number(lora_alpha) or not math.isfinite(lora_alpha):
        raise ValueError(f"{where}: expected a finite number lora_alpha, got {lora_alpha!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class LoRALayer(AdapterLayer):
    """The settings that linear and embedding share, keyed by adapter name."""

    delta_is_transposed = False  # delta_weight gives (s B A)^T, as the base stores its weight

    settings_attributes = ("r", "lora_alpha", "scaling", "use_rslora")

    def __init__(self, base_layer: nn.Module, *args):
        super().__init__(base_layer, *args)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}

    def _set(self, name: str, r: int, lora_alpha: float, use_rslora: bool, lora_dropout: float) -> None:
        check_rank(type(self).__name__, r, lora_alpha, lora_dropout)
        check_adapter_name(type(self).__name__, name)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.use_rslora[name] = use_rslora
        self.scaling[name] = self.initial_scale(name)

    def lora_pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, K], B [N, r]) of an adapter."""
        raise NotImplementedError

    # -- the weight of an adapter's update, by PEFT's names -----------------------------------------------------------------

    def initial_scale(self, name: str) -> float:
        return lora_scale(self.r[name], self.lora_alpha[name], self.use_rslora[name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """s = scale times the adapter's initial scale; a layer without the adapter is left as it is."""
        if adapter in self.scaling:
            self._rescale(adapter, scale * self.initial_scale(adapter))

    def scale_layer(self, scale: float) -> None:
        """s *= scale, for the active adapters."""
        for name in self.active_adapters:
            self._rescale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """s /= scale, for the active adapters; without a number, their initial scales."""
        for name in self.active_adapters:
            self._rescale(name, self.initial_scale(name) if scale is None else self.scaling[name] / scale)

    def _rescale(self, name: str, scale: float) -> None:
        if not _is_number(scale) or not math.isfinite(scale):
            raise ValueError(f"set_scale: expected a finite scale for {name!r}, got {scale!r}")
        if name in self.merged_adapters:
            raise ValueError(
                f"set_scale: expected an adapter that is not merged, got {name!r}; call unmerge_adapter first"
            )
        self.scaling[name] = scale
