"""LN tuning: a norm's own weights are trained, in a copy beside the frozen ones (Zhao et al. 2023, arXiv:2312.11420)."""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.linear_adapter import check_adapter_name


class NormTuning(AdapterLayer):
    """A norm of which every adapter has its own copy.

        y = copy(x) of the active adapter; base_layer(x) without one

    Bases:   any module whose only parameters are a weight and perhaps a bias: nn.LayerNorm, the RMSNorms of transformers
    Dtypes:  the copy is float32 over a float16 or bfloat16 module (autocast_adapter_dtype) and computes in float32, because a
             weight near one takes no small steps in half precision; y has x's dtype
    Grads:   x, and the copy's weight and bias
    Init:    the base's values
    Merging: the base takes the copy's values; one adapter at a time
    Raises:  TypeError for a module with other parameters; ValueError where two adapters are to be active
    """

    adapter_attributes = ("ln_tuning_layers",)

    def __init__(self, base_layer: nn.Module, *, adapter_name: str = "default", autocast_adapter_dtype: bool = True):
        check_adapter_name("NormTuning", adapter_name)
        parameters = dict(base_layer.named_parameters())
        floating = all(parameter.is_floating_point() for parameter in parameters.values())
        if not floating or "weight" not in parameters or not set(parameters) <= {"weight", "bias"}:
            raise TypeError(
                f"NormTuning: expected a module with a weight and perhaps a bias, such as a norm, got "
                f"{type(base_layer).__name__} with {sorted(parameters)[:6]}"
            )
        super().__init__(base_layer)
        own = copy.deepcopy(base_layer).requires_grad_(True)
        if autocast_adapter_dtype and base_layer.weight.dtype in (torch.float16, torch.bfloat16):
            own.float()
        self.ln_tuning_layers = nn.ModuleDict({adapter_name: own})
        base_layer.requires_grad_(False)
        self.set_adapter(adapter_name)

    def check_selection(self, names: Iterable[str]) -> None:
        mine = [name for name in names if name in self.ln_tuning_layers]
        if len(mine) > 1:
            raise ValueError(
                f"set_adapter: expected at most one active adapter with its own copy of a norm, got {mine}; copies do not add up"
            )

    def compute(self, names: list[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not names:
            return self.base_layer(x, *args, **kwargs)
        own = self.ln_tuning_layers[names[0]]
        if x.is_floating_point() and own.weight.dtype != x.dtype:
            return own(x.to(own.weight.dtype), *args, **kwargs).to(x.dtype)
        return own(x, *args, **kwargs)

    def merged_tensors(self, names: Iterable[str], weight: torch.Tensor, bias: torch.Tensor | None):
        names = list(names)
        self.check_selection(names)
        return super().merged_tensors(names, weight, bias)

    def merge_into(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None):
        own = self.ln_tuning_layers[name]
        return own.weight.detach().to(weight), None if bias is None else own.bias.detach().to(bias)
