"""What a linear module with LoRA or DoRA adapters computes, for any module that holds their tensors under PEFT's names.

    LoRA    y = W x + bias + sum over names of s (B (A drop(x)) + lora_bias)
    DoRA    y = m (W + s B A) x / ||W + s B A||_row + bias

LoRALinear is one such module; PEFT's own layers, once they are accelerated, are others.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.layers import shared_input
from fastpeft.layers.base_weight import compute_dtype, frozen_weight
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.dora_torch import row_squares
from fastpeft.ops.lora_group import Projection, lora_linear_group
from fastpeft.ops.tracing import traced


class LoRAProducts:
    """Mixin: `run_with(names, x)` is the output with these adapters acting, over a plain frozen linear base.

    It reads base_layer and, by adapter name, lora_A, lora_B, lora_dropout, lora_magnitude_vector and scaling.
    impl, exact: options of the ops; followers: set by link_siblings
    """

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
    scaling: dict[str, float]

    impl: str = "auto"
    exact: bool = False
    followers: "shared_input.Followers | None" = None
    _row_squares: tuple | None = None

    def row_squares(self) -> torch.Tensor:
        """rowsum(W^2) [N]; computed anew when the base holds another weight than the last time, or changed it."""
        held = self.base_layer.weight
        if traced(held):  # a tracer knows no addresses
            return row_squares(frozen_weight(self.base_layer)) if self._row_squares is None else self._row_squares[1]
        mark = id(held), held.data_ptr(), held._version, held.dtype, held.device
        if self._row_squares is None or self._row_squares[0] != mark:
            self._row_squares = mark, row_squares(frozen_weight(self.base_layer))
        return self._row_squares[1]

    def _dropout_p(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def call_with(self, names: Sequence[str], x: torch.Tensor) -> "shared_input.Call | None":
        """The one call of lora_linear_group that gives run_with(names, x), if there is one."""
        if len(names) != 1:
            return None
        (name,), base = names, self.base_layer
        b = self.lora_B[name]
        if b.bias is not None or name in self.lora_magnitude_vector or compute_dtype(base, x.dtype) != x.dtype:
            return None
        a, scale, p = self.lora_A[name].weight, self.scaling[name], self._dropout_p(name)
        return shared_input.Call(
            Projection(frozen_weight(base), a, b.weight, base.bias, scale, p), self.impl, self.exact
        )

    def run_with(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        """The output with these adapters acting, together with the siblings' that read the same x."""
        call = self.call_with(names, x)
        if call is not None:
            return shared_input.forward(self, call, x)
        base = self.base_layer
        plain = [name for name in names if name not in self.lora_magnitude_vector]
        if len(names) == 1 and not plain:
            return self._dora(x, names[0], base.bias)
        left: list[str] = []
        projection = Projection(frozen_weight(base), bias=base.bias)
        if plain:
            projection, left = self._leading(plain)
        y = self._computed(x, projection)
        for name in left + [name for name in names if name not in plain]:
            y = y + self.update_of(x, name).to(y.dtype)
        return y

    def _computed(self, x: torch.Tensor, projection: Projection) -> torch.Tensor:
        """One projection, in the dtype that the base computes in."""
        wanted = compute_dtype(self.base_layer, x.dtype)
        (y,) = lora_linear_group(x.to(wanted), [projection], impl=self.impl, exact=self.exact)
        return y if wanted == x.dtype else y.to(x.dtype)

    def _dora(self, x: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        wanted = compute_dtype(self.base_layer, x.dtype)
        y = dora_linear(
            x.to(wanted),
            frozen_weight(self.base_layer),
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.lora_magnitude_vector[name].weight,
            bias,
            scale=self.scaling[name],
            dropout_p=self._dropout_p(name),
            w_sq=self.row_squares(),
            impl=self.impl,
        )
        return y if wanted == x.dtype else y.to(x.dtype)

    def _leading(self, names: list[str]) -> tuple[Projection, list[str]]:
        """What of several adapters goes into the base's op, and the names that are left.

        Adapters without dropout join into one of the summed rank; one with dropout goes in alone, as its mask is its own.
        """
        first, w, base_bias = names[0], frozen_weight(self.base_layer), self.base_layer.bias
        if len(names) > 1 and not any(map(self._dropout_p, names)):
            a = torch.cat([self.lora_A[name].weight for name in names])
            b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in names], dim=1)
            biases = [bias for bias in map(self._scaled_bias, names) if bias is not None]
            return Projection(w, a, b, self._sum_bias(base_bias, biases)), []
        b = self.lora_B[first]
        bias = base_bias if b.bias is None else self._sum_bias(base_bias, [self._scaled_bias(first)])
        a, scale, p = self.lora_A[first].weight, self.scaling[first], self._dropout_p(first)
        return Projection(w, a, b.weight, bias, scale, p), names[1:]

    def _scaled_bias(self, name: str) -> torch.Tensor | None:
        bias = self.lora_B[name].bias
        return None if bias is None else bias * self.scaling[name]

    @staticmethod
    def _sum_bias(base_bias, biases):
        if not biases:
            return base_bias
        return sum(biases) if base_bias is None else base_bias + sum(biases)

    def update_of(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """What one adapter alone adds to the base's output, for what cannot go into the base's op."""
        if name in self.lora_magnitude_vector:
            return self._dora(x, name, None) - self._computed(x, Projection(frozen_weight(self.base_layer)))
        a, b = self.lora_A[name].weight, self.lora_B[name]
        dropped = F.dropout(x, self._dropout_p(name)).to(a.dtype)
        return F.linear(F.linear(dropped, a), b.weight, b.bias) * self.scaling[name]
