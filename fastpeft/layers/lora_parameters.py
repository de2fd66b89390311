"""LoRA over parameters that a module multiplies by itself: the experts' weights of a mixture, [E, N, K] in one tensor.

    W_e' = W_e + s B_e A_e      for each expert e, in the module's own forward

    A [E r, K]   rows e r .. e r + r - 1 are A_e
    B [N, r E]   columns e, E + e, 2 E + e, ... are B_e: expert by expert within each rank, as PEFT stores it

Source:  Hu et al. 2021, arXiv:2106.09685; the layout on disk is PEFT's for target_parameters
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from fastpeft.layers.base_weight import is_quantized
from fastpeft.layers.lora_init import InitLoraWeights
from fastpeft.layers.lora_settings import LoRALayer, lora_scale


class ParameterShape(NamedTuple):
    """experts: 1 for a matrix; inputs K and outputs N; transposed: stored [E, K, N] instead of [E, N, K]."""

    experts: int
    inputs: int
    outputs: int
    transposed: bool

    @classmethod
    def of(cls, owner: nn.Module, name: str) -> "ParameterShape":
        """Raises ValueError for a parameter that is no matrix and no stack of matrices."""
        shape = tuple(getattr(owner, name).shape)
        if len(shape) == 2:
            return cls(1, shape[1], shape[0], False)
        if len(shape) != 3:
            raise ValueError(
                f"target_parameters: expected parameters with 2 or 3 dimensions, got {name} {shape} of {type(owner).__name__}"
            )
        transposed = bool(getattr(owner, "is_transposed", False))
        experts, first, second = shape
        return cls(experts, *((first, second) if transposed else (second, first)), transposed)


class LoRAParameters(LoRALayer):
    """A module with LoRA on some of its own parameters: a drop-in for the module.

    parameter_ranks: rank and lora_alpha of each parameter
    Shapes:  parameters [N, K], [E, N, K], or [E, K, N] where the module says is_transposed (gpt-oss)
    Dtypes:  A and B float32 over half precision; the sum W + s B A is taken in W's dtype
    Memory:  one copy of each adapted parameter while the module runs
    Scale:   `scaling` is 1, and multiplies each parameter's own alpha / r
    Raises:  ValueError for a parameter that cannot be adapted or an initialisation beyond True, False, "gaussian"
    """

    adapter_attributes = ("lora_A", "lora_B")
    settings_attributes = (*LoRALayer.settings_attributes, "own_scales")

    def __init__(
        self,
        base_layer: nn.Module,
        parameter_ranks: dict[str, tuple[int, float]],
        *,
        adapter_name: str = "default",
        use_rslora: bool = False,
        init_lora_weights: InitLoraWeights = True,
        autocast_adapter_dtype: bool = True,
    ):
        if is_quantized(base_layer):
            raise NotImplementedError(
                f"target_parameters: expected full weights, got the quantised {type(base_layer).__name__}; name the module in "
                "target_modules"
            )
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"target_parameters: expected init_lora_weights True, False or 'gaussian', got {init_lora_weights!r}"
            )
        super().__init__(base_layer)
        self._merged_over: dict[str, nn.Parameter] = {}  # the module's own, while merged ones stand in their place
        first_rank, first_alpha = next(iter(parameter_ranks.values()))
        self._set(adapter_name, first_rank, first_alpha, use_rslora, 0.0)
        self.own_scales = {
            adapter_name: {name: lora_scale(r, alpha, use_rslora) for name, (r, alpha) in parameter_ranks.items()}
        }
        self.lora_A = nn.ModuleDict({adapter_name: nn.ModuleDict()})
        self.lora_B = nn.ModuleDict({adapter_name: nn.ModuleDict()})
        for name, (r, _) in parameter_ranks.items():
            a, b = self._factors(name, r, init_lora_weights, autocast_adapter_dtype)
            self.lora_A[adapter_name][name], self.lora_B[adapter_name][name] = a, b
            getattr(base_layer, name).requires_grad_(False)
        self.set_adapter(adapter_name)

    def _factors(self, name: str, r: int, kind: InitLoraWeights, autocast: bool) -> tuple[nn.Linear, nn.Linear]:
        held, shape = getattr(self.base_layer, name), ParameterShape.of(self.base_layer, name)
        half = held.dtype in (torch.float16, torch.bfloat16)
        if not held.is_floating_point():
            raise ValueError(f"target_parameters: expected a floating parameter, got {name} in {held.dtype}")
        factory = {"device": held.device, "dtype": torch.float32 if half and autocast else held.dtype}
        a = nn.Linear(shape.inputs, r * shape.experts, bias=False, **factory)
        b = nn.Linear(r * shape.experts, shape.outputs, bias=False, **factory)
        if kind == "gaussian":
            nn.init.normal_(a.weight, std=1 / r)
        elif kind is True:
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        if kind is not False:
            nn.init.zeros_(b.weight)
        return a, b

    def initial_scale(self, name: str) -> float:
        return 1.0

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """On disk PEFT has one wrapper around another for each parameter: the last one is the outermost."""
        if name not in self.lora_A:
            return {}
        tensors = {}
        names = self._parameter_names(name)
        for depth, parameter in enumerate(reversed(names)):
            for attribute in self.adapter_attributes:
                key = f"{'base_layer.' * depth}{attribute}.weight"
                tensors[key] = getattr(self, attribute)[name][parameter].weight
        return tensors

    def _parameter_names(self, adapter: str) -> list[str]:
        """The adapted parameters in the module's order."""
        return [name for name, _ in self.base_layer.named_parameters(recurse=False) if name in self.lora_A[adapter]]

    def absorb(self, other: "LoRAParameters") -> None:
        super().absorb(other)
        for adapter in other.lora_A:
            for name in self.lora_A[adapter]:
                getattr(self.base_layer, name).requires_grad_(False)

    # -- forward ----------------------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs) -> torch.Tensor:
        if self.row_adapters is not None and not self.disable_adapters:
            used = [name for name in dict.fromkeys(self.row_adapters) if name in self.lora_A]
            if used:
                raise NotImplementedError(
                    f"adapter_names: expected adapters without target_parameters, got {used}: experts see tokens, not items; "
                    "run each by itself"
                )
            return self.base_layer(*args, **kwargs)
        off = self.disable_adapters or self.merged_adapters
        return self.compute([] if off else self.active_adapters, *args, **kwargs)

    def compute(self, names: list[str], *args, **kwargs) -> torch.Tensor:
        if not names:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, self._acting(names), args, kwargs)

    def _acting(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The parameters with these adapters in them, in their own dtype."""
        changed: dict[str, torch.Tensor] = {}
        for adapter in names:
            for name in self.lora_A[adapter]:
                held = changed.get(name, getattr(self.base_layer, name))
                left, right, scale = self._stacks(adapter, name)
                stack = held if held.dim() == 3 else held[None]
                with torch.autocast(held.device.type, enabled=False):
                    total = torch.baddbmm(stack, left.to(held.dtype), right.to(held.dtype), alpha=scale)
                changed[name] = total.view(held.shape)
        return changed

    def _stacks(self, adapter: str, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(left, right, s): the update s left @ right, per expert, in the parameter's layout."""
        shape = ParameterShape.of(self.base_layer, name)
        a, b = self.lora_A[adapter][name].weight, self.lora_B[adapter][name].weight
        a = a.view(shape.experts, -1, shape.inputs)  # [E, r, K]
        b = b.view(shape.outputs, -1, shape.experts).permute(2, 0, 1)  # [E, N, r]
        scale = self.scaling[adapter] * self.own_scales[adapter][name]
        return (a.transpose(1, 2), b.transpose(1, 2), scale) if shape.transposed else (b, a, scale)

    # -- merging ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _merged_values(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Every adapted parameter with these adapters in it, summed in float32 or wider and rounded once."""
        own: dict[str, torch.Tensor] = {}
        totals: dict[str, torch.Tensor] = {}
        for adapter in names:
            for name in self.lora_A[adapter]:
                own[name] = self._merged_over.get(name, getattr(self.base_layer, name))
                wide = torch.promote_types(own[name].dtype, torch.float32)
                left, right, scale = self._stacks(adapter, name)
                delta = (left.to(wide) @ right.to(wide)).mul_(scale).view(own[name].shape)
                totals[name] = totals[name].add_(delta) if name in totals else delta.add_(own[name].to(wide))
        return {name: total.to(own[name].dtype) for name, total in totals.items()}

    def merge(self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False) -> None:
        wanted = self.active_adapters if adapter_names is None else adapter_names
        new = [name for name in wanted if name in self.adapter_names and name not in self.merged_adapters]
        if not new:
            return
        names = [*self.merged_adapters, *new]
        values = self._merged_values(names)
        if safe_merge and not all(bool(value.isfinite().all()) for value in values.values()):
            raise ValueError(f"merge: the sum of a parameter and {names} has values that are not finite; not merged")
        for name, value in values.items():
            self._merged_over.setdefault(name, getattr(self.base_layer, name))
            setattr(self.base_layer, name, nn.Parameter(value, requires_grad=False))
        self.merged_adapters = names

    def merges_finite(self, adapter_names: Iterable[str]) -> bool:
        new = [name for name in adapter_names if name in self.adapter_names and name not in self.merged_adapters]
        values = self._merged_values([*self.merged_adapters, *new])
        return all(bool(value.isfinite().all()) for value in values.values())

    def unmerge(self) -> None:
        """Put the module's own parameters back, bit for bit, where the module is now."""
        for name, own in self._merged_over.items():
            own.data = own.data.to(getattr(self.base_layer, name))
            setattr(self.base_layer, name, own)
        self._merged_over, self.merged_adapters = {}, []

    def bake(self, names: Iterable[str] | None) -> nn.Module:
        self.merge(names)
        self._merged_over, self.merged_adapters = {}, []
        return self.base_layer
