"""LoRA and DoRA over a linear module; LoRA over an embedding is in lora_embedding.py.

    LoRA    y = W x + bias + sum over active adapters of s (B (A drop(x)) + lora_bias)
    DoRA    y = m (W + s B A) x / ||W + s B A||_row + bias

Source:  Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; DoRA: Liu et al. 2024, arXiv:2402.09353
"""

from collections.abc import Iterable

import torch
from torch import nn

from fastpeft.layers import shared_input
from fastpeft.layers.linear_adapter import LinearAdapter, tensor_factory
from fastpeft.layers.lora_embedding import LoRAEmbedding
from fastpeft.layers.lora_init import InitLoraWeights, initialise
from fastpeft.layers.lora_products import LoRAProducts
from fastpeft.layers.lora_settings import LoRALayer
from fastpeft.layers.row_adapters import lora_linear_layer
from fastpeft.ops.dora import EPS
from fastpeft.ops.dora_torch import row_norm
from fastpeft.ops.weights import dense

__all__ = ["LoRAEmbedding", "LoRALinear"]


class Magnitude(nn.Module):
    """The lengths m [N] of DoRA's rows: PEFT's name for them ends in `.weight`, but not on disk."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoRALinear(LoRAProducts, LoRALayer, LinearAdapter):
    """A linear module with LoRA or DoRA: a drop-in for the linear that it wraps.

        y = x W^T + bias + s (drop(x) A^T) B^T,    s = lora_alpha / r   (lora_alpha / sqrt(r) with use_rslora)
        with use_dora:  y = m / ||W + s B A||_row * (x W^T + s (x A^T) B^T) + bias,  dropout as in ops/dora.py

    Shapes:  x [..., K] -> y [..., N]; A [r, K], B [N, r], m [N]
    Bases:   nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt
    Dtypes:  A, B, m are float32 over a float16, bfloat16 or quantised base (autocast_adapter_dtype), else the base's dtype.
             They are rounded to x's dtype for the products; exact=True takes these in float32: ops/lora_group.py has the errors
    Grads:   x, A, B, m, lora_bias, and the base's bias if it requires one; the base's weight is frozen
    Init:    lora_init.py has the choices; True: A Kaiming-uniform, B zero. m = ||W + s B A||_row
    impl:    implementation of the op: "auto", "torch", "triton", "reference"
    Sharing: linears that are called one after another with one input are computed together (shared_input.py)
    Raises:  TypeError for a base module that is not linear; ValueError for r < 1 or dropout outside [0, 1)
    Source:  Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353

    >>> layer = LoRALinear(nn.Linear(64, 64), r=8, lora_alpha=16)
    """

    adapter_attributes = ("lora_A", "lora_B")  # and lora_magnitude_vector, where an adapter has one
    settings_attributes = (*LoRALayer.settings_attributes, "lora_dropout")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        adapter_name: str = "default",
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: InitLoraWeights = True,
        loftq_config: dict | None = None,
        autocast_adapter_dtype: bool = True,
        impl: str = "auto",
        exact: bool = False,
    ):
        if use_dora and lora_bias:
            raise ValueError("LoRALinear: expected use_dora or lora_bias, got both; DoRA has no bias of its own")
        super().__init__(base_layer, impl)
        self.exact = exact
        n, k = self.out_features, self.in_features
        self._set(adapter_name, r, lora_alpha, use_rslora, lora_dropout)
        factory = tensor_factory(base_layer, autocast_adapter_dtype)
        self.lora_A = nn.ModuleDict({adapter_name: nn.Linear(k, r, bias=False, **factory)})
        self.lora_B = nn.ModuleDict({adapter_name: nn.Linear(r, n, bias=lora_bias, **factory)})
        self.lora_dropout = nn.ModuleDict({adapter_name: nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()})
        self.lora_magnitude_vector = nn.ModuleDict()
        start = initialise(
            base_layer,
            self.lora_A[adapter_name],
            self.lora_B[adapter_name],
            init_lora_weights,
            self.scaling[adapter_name],
            loftq_config or {},
        )
        if start is not None:
            self.started_from[adapter_name] = start
        self.set_adapter(adapter_name)
        if use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(
                self._initial_magnitude(adapter_name, factory["dtype"])
            )
        self.freeze_base()
        self.set_adapter(adapter_name)

    @property
    def delta_is_transposed(self) -> bool:
        return self.fan_in_fan_out

    def lora_pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight

    @torch.no_grad()
    def _initial_magnitude(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        squares = self.row_squares()
        w = dense(self.frozen_weight(), squares.dtype)
        return row_norm(w, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], squares).to(dtype)

    # -- adapters: those of AdapterLayer, and a magnitude where there is one ----------------------------------------------

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        tensors = super().adapter_tensors(name)
        if name in self.lora_magnitude_vector:
            tensors["lora_magnitude_vector"] = self.lora_magnitude_vector[name].weight
        return tensors

    def absorb(self, other: "LoRALinear") -> None:
        super().absorb(other)
        self.lora_magnitude_vector.update(other.lora_magnitude_vector)

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        if name in self.lora_magnitude_vector:
            del self.lora_magnitude_vector[name]

    def check_selection(self, names: Iterable[str]) -> None:
        names = list(names)
        super().check_selection(names)
        changed = [name for name in names if name in self.started_from]
        others = [name for name in names if name in self.lora_magnitude_vector and name not in changed]
        if changed and others:
            raise ValueError(
                f"set_adapter: expected {changed[0]!r}, which starts from changed base weights, without DoRA beside it, got "
                f"{others}: its gain is for the base's own weights"
            )

    # -- forward ----------------------------------------------------------------------------------------------------------

    def shared_call(self, x: torch.Tensor) -> "shared_input.Call | None":
        """What this layer computes for x, if one call of lora_linear_group does all of it."""
        if self.disable_adapters or self.merged_adapters or not self.base_is_plain():
            return None
        return self.call_with(self.active_adapters, x)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        names = self.active_adapters
        if self.row_adapters is not None and not self.disable_adapters:
            return lora_linear_layer(self, x)
        if self.disable_adapters or self.merged_adapters or not names:
            return self.base_forward(x, *args, **kwargs)
        if self.base_is_plain():
            return self.run_with(names, x)
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = y + self.update_of(x, name).to(y.dtype)
        return y

    # -- merging ----------------------------------------------------------------------------------------------------------

    def delta_weight(self, name: str) -> torch.Tensor:
        """s B A, or with DoRA m (W + s B A) / ||W + s B A||_row - W, in the base weight's layout, in float32 or wider."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        wide = torch.promote_types(a.dtype, torch.float32)
        delta = (b.to(wide) @ a.to(wide)).mul_(self.scaling[name])
        if name in self.lora_magnitude_vector:
            own = self.parameters_under([name]).dense()
            wide = torch.promote_types(wide, own.dtype)
            w = (own.t() if self.fan_in_fan_out else own).to(wide)
            v = w + delta.to(wide)
            gain = self.lora_magnitude_vector[name].weight.to(wide) / v.norm(dim=1).clamp_min(EPS)
            delta = v.mul_(gain[:, None]).sub_(w)
        return delta.t() if self.fan_in_fan_out else delta

    def delta_bias(self, name: str) -> torch.Tensor | None:
        return self._scaled_bias(name)
