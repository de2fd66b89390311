"""IA3: activations are scaled by a learned vector (Liu et al. 2022, arXiv:2205.05638)."""

import torch
from torch import nn

from fastpeft.layers.linear_adapter import LinearAdapter, check_adapter_name, tensor_factory


class IA3Linear(LinearAdapter):
    """A linear module with its output, or its input, scaled by a learned vector.

        y = l * (x W^T + bias)          l [N, 1]
        y = (l * x) W^T + bias          l [1, K], for a feed-forward module

    Shapes:  x [..., K] -> y [..., N]
    Bases:   nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt
    Dtypes:  l is float32 over a float16, bfloat16 or quantised base (autocast_adapter_dtype), else the base's dtype; the product
             is taken in the wider of l's and x's, and rounded to x's
    Grads:   x and l; kept for backward: what l multiplies, in its own dtype
    Init:    ones, so the wrapped module's function is unchanged; init_ia3_weights=False: normal
    Several: the vectors of active adapters multiply
    """

    adapter_attributes = ("ia3_l",)
    settings_attributes = ("is_feedforward",)

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        adapter_name: str = "default",
        is_feedforward: bool = False,
        init_ia3_weights: bool = True,
        autocast_adapter_dtype: bool = True,
        impl: str = "auto",
    ):
        check_adapter_name("IA3Linear", adapter_name)
        super().__init__(base_layer, impl)
        shape = (1, self.in_features) if is_feedforward else (self.out_features, 1)
        draw = torch.ones if init_ia3_weights else torch.randn
        scales = draw(shape, **tensor_factory(base_layer, autocast_adapter_dtype))
        self.ia3_l = nn.ParameterDict({adapter_name: nn.Parameter(scales)})
        self.is_feedforward = {adapter_name: is_feedforward}
        self.freeze_base()
        self.set_adapter(adapter_name)

    def _scale(self, names: list[str], is_feedforward: bool) -> torch.Tensor | None:
        """The product of these adapters' vectors on the input, or on the output; None without one."""
        scale = None
        for name in names:
            if self.is_feedforward[name] is is_feedforward:
                own = self.ia3_l[name].flatten()
                scale = own if scale is None else scale * own
        return scale

    def compute(self, names: list[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        on_input, on_output = self._scale(names, True), self._scale(names, False)
        y = self.base_forward(x if on_input is None else (x * on_input).to(x.dtype), *args, **kwargs)
        return y if on_output is None else (y * on_output).to(y.dtype)

    def merge_into(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None):
        """The rows of W and the bias times l, or the columns of W."""
        scale = self.ia3_l[name].flatten().to(weight.dtype)
        by_row = self.is_feedforward[name] is self.fan_in_fan_out
        weight *= scale[:, None] if by_row else scale[None, :]
        if bias is not None and not self.is_feedforward[name]:
            bias *= scale
        return weight, bias
