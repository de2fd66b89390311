"""LoRA over a linear or an embedding module.

    linear      y = W x + bias + sum over active adapters of s (B (A drop(x)) + lora_bias)
    embedding   y = W[ids] + sum over active adapters of s (A^T)[ids] B^T

Source:  Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732
"""

import math
import numbers
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.ops.lora import lora_linear

InitLoraWeights = bool | Literal["gaussian"]


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2): a linear whose weight is stored [K, N]. Known by name: no import needed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


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


class _LoRALayer(AdapterLayer):
    """The settings that linear and embedding share, keyed by adapter name."""

    settings_attributes = ("r", "lora_alpha", "scaling")

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}

    def _set(self, name: str, r: int, lora_alpha: float, use_rslora: bool, lora_dropout: float) -> None:
        check_rank(type(self).__name__, r, lora_alpha, lora_dropout)
        if "." in name or not name:
            raise ValueError(f"{type(self).__name__}: expected an adapter name without dots, got {name!r}")
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name] = lora_scale(r, lora_alpha, use_rslora)

    def _factory(self, autocast_adapter_dtype: bool) -> dict:
        """Where and in which dtype an adapter's tensors are made: with the base, in float32 where the base is half precision."""
        weight = self.base_layer.weight
        half = weight.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if (half and autocast_adapter_dtype) or not weight.is_floating_point() else weight.dtype
        return {"device": weight.device, "dtype": dtype}


class LoRALinear(_LoRALayer):
    """A linear module with LoRA: a drop-in for the nn.Linear or transformers Conv1D that it wraps.

        y = x W^T + bias + s (drop(x) A^T) B^T,    s = lora_alpha / r   (lora_alpha / sqrt(r) with use_rslora)

    Shapes:  x [..., K] -> y [..., N]; A [r, K], B [N, r]
    Dtypes:  A and B are float32 over a float16 or bfloat16 base (autocast_adapter_dtype), else the base's dtype
    Grads:   x, A, B, lora_bias, and the base's bias if it requires one; the base's weight is frozen
    Init:    True: A Kaiming-uniform, B zero (the wrapped module's function is unchanged); "gaussian": A ~ N(0, 1/r), B zero;
             False: both Kaiming-uniform
    impl:    implementation of the op: "auto", "torch", "triton", "reference"
    Raises:  TypeError for a base module that is not linear; ValueError for r < 1 or dropout outside [0, 1)
    Source:  Hu et al. 2021, arXiv:2106.09685

    >>> layer = LoRALinear(nn.Linear(64, 64), r=8, lora_alpha=16)
    """

    adapter_attributes = ("lora_A", "lora_B")
    settings_attributes = (*_LoRALayer.settings_attributes, "lora_dropout")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        adapter_name: str = "default",
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: InitLoraWeights = True,
        autocast_adapter_dtype: bool = True,
        impl: str = "auto",
    ):
        if not (isinstance(base_layer, nn.Linear) or is_conv1d(base_layer)):
            raise TypeError(
                f"LoRALinear: expected an nn.Linear or transformers Conv1D, got {type(base_layer).__name__}"
            )
        super().__init__(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.impl = impl
        n, k = self._weight().shape
        self.in_features, self.out_features = k, n
        self._set(adapter_name, r, lora_alpha, use_rslora, lora_dropout)
        factory = self._factory(autocast_adapter_dtype)
        self.lora_A = nn.ModuleDict({adapter_name: nn.Linear(k, r, bias=False, **factory)})
        self.lora_B = nn.ModuleDict({adapter_name: nn.Linear(r, n, bias=lora_bias, **factory)})
        self.lora_dropout = nn.ModuleDict({adapter_name: nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()})
        self._reset(adapter_name, init_lora_weights)
        base_layer.weight.requires_grad_(False)
        if base_layer.bias is not None:
            base_layer.bias.requires_grad_(False)
        self.set_adapter(adapter_name)

    def _reset(self, name: str, init_lora_weights: InitLoraWeights) -> None:
        a, b = self.lora_A[name], self.lora_B[name]
        if init_lora_weights is False:
            return  # nn.Linear has drawn both already
        if init_lora_weights is True:
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        elif init_lora_weights == "gaussian":
            nn.init.normal_(a.weight, std=1 / self.r[name])
        else:
            raise ValueError(f"init_lora_weights: expected True, False or 'gaussian', got {init_lora_weights!r}")
        nn.init.zeros_(b.weight)
        if b.bias is not None:
            nn.init.zeros_(b.bias)

    def _weight(self) -> torch.Tensor:
        """The frozen weight as [N, K], whatever way the base stores it."""
        weight = self.base_layer.weight
        return weight.t() if self.fan_in_fan_out else weight

    def _dropout_p(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _base_is_plain(self) -> bool:
        """True if the base's forward is just its weight and bias: no subclass, hook, or instance override to honour."""
        base = self.base_layer
        own_forward = self.fan_in_fan_out or type(base).forward is nn.Linear.forward
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return own_forward and not hooked and "forward" not in base.__dict__ and not base.weight.requires_grad

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        names = self.active_adapters
        if self.disable_adapters or self.merged_adapters or not names:
            return self.base_layer(x, *args, **kwargs)
        if not self._base_is_plain():
            y = self.base_layer(x, *args, **kwargs)
        else:
            a, b, bias, scale, dropout_p, names = self._leading(names)
            y = lora_linear(x, self._weight(), a, b, bias, scale=scale, dropout_p=dropout_p, impl=self.impl)
        for name in names:
            y = y + self._low_rank(x, name).to(y.dtype)
        return y

    def _leading(self, names: list[str]):
        """(a, b, bias, scale, dropout_p) of the adapters that go into the base's op, and the names that are left.

        Adapters without dropout join into one of the summed rank; one with dropout goes in alone, as its mask is its own.
        """
        first = names[0]
        base_bias = self.base_layer.bias
        if len(names) > 1 and not any(map(self._dropout_p, names)):
            a = torch.cat([self.lora_A[name].weight for name in names])
            b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], dim=1)
            biases = [bias for bias in map(self._scaled_bias, names) if bias is not None]
            return a, b, self._sum_bias(base_bias, biases), 1.0, 0.0, []
        b = self.lora_B[first]
        bias = base_bias if b.bias is None else self._sum_bias(base_bias, [self._scaled_bias(first)])
        return self.lora_A[first].weight, b.weight, bias, self.scaling[first], self._dropout_p(first), names[1:]

    def _scaled_bias(self, name: str) -> torch.Tensor | None:
        bias = self.lora_B[name].bias
        return None if bias is None else bias * self.scaling[name]

    @staticmethod
    def _sum_bias(base_bias, biases):
        if not biases:
            return base_bias
        return sum(biases) if base_bias is None else base_bias + sum(biases)

    def _low_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """s (B (A drop(x)) + lora_bias) alone, for what cannot go into the base's op."""
        a, b = self.lora_A[name].weight, self.lora_B[name]
        dropped = F.dropout(x, self._dropout_p(name)).to(a.dtype)
        return F.linear(F.linear(dropped, a), b.weight, b.bias) * self.scaling[name]

    def delta_weight(self, name: str) -> torch.Tensor:
        """s B A in the base weight's layout, in float32 or wider."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        wide = torch.promote_types(a.dtype, torch.float32)
        delta = (b.to(wide) @ a.to(wide)).mul_(self.scaling[name])
        return delta.t() if self.fan_in_fan_out else delta

    def delta_bias(self, name: str) -> torch.Tensor | None:
        return self._scaled_bias(name)


class LoRAEmbedding(_LoRALayer):
    """An embedding with LoRA: a drop-in for the nn.Embedding that it wraps.

        y = W[ids] + s (A^T)[ids] B^T,    times the base's own embed_scale where it has one (Gemma 3)

    Shapes:  ids [...] integers below V -> y [..., D]; A [r, V], B [D, r]
    Init:    True: A zero, B ~ N(0, 1) as in PEFT (the wrapped module's function is unchanged); False: both ~ N(0, 1)
    Raises:  TypeError for a base module that is not an nn.Embedding; ValueError for r < 1
    """

    adapter_attributes = ("lora_embedding_A", "lora_embedding_B")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        adapter_name: str = "default",
        use_rslora: bool = False,
        init_lora_weights: InitLoraWeights = True,
        autocast_adapter_dtype: bool = True,
    ):
        if not isinstance(base_layer, nn.Embedding):
            raise TypeError(f"LoRAEmbedding: expected an nn.Embedding, got {type(base_layer).__name__}")
        super().__init__(base_layer)
        self._set(adapter_name, r, lora_alpha, use_rslora, 0.0)
        vocabulary, dim = base_layer.weight.shape
        factory = self._factory(autocast_adapter_dtype)
        a = torch.zeros(r, vocabulary, **factory) if init_lora_weights else torch.randn(r, vocabulary, **factory)
        self.lora_embedding_A = nn.ParameterDict({adapter_name: nn.Parameter(a)})
        self.lora_embedding_B = nn.ParameterDict({adapter_name: nn.Parameter(torch.randn(dim, r, **factory))})
        base_layer.weight.requires_grad_(False)
        self.set_adapter(adapter_name)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(ids)
        if self.disable_adapters or self.merged_adapters:
            return y
        base = self.base_layer
        options = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)
        for name in self.active_adapters:
            rows = F.embedding(ids, self.lora_embedding_A[name].t(), *options)
            delta = (rows @ self.lora_embedding_B[name].t()) * self.scaling[name]
            embed_scale = getattr(base, "embed_scale", None)
            y = y + (delta if embed_scale is None else delta * embed_scale).to(y.dtype)
        return y

    def delta_weight(self, name: str) -> torch.Tensor:
        """s (B A)^T, [V, D], in float32 or wider."""
        a, b = self.lora_embedding_A[name], self.lora_embedding_B[name]
        wide = torch.promote_types(a.dtype, torch.float32)
        return (a.t().to(wide) @ b.t().to(wide)).mul_(self.scaling[name])
