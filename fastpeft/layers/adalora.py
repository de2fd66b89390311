"""AdaLoRA over a linear module: an update in the form of a singular value decomposition, whose triples can be switched off.

    y = x W^T + bias + s (drop(x) (A E)^T) B^T,    s = lora_alpha / (init_r + 1e-5)

Which triples (row of A, E, column of B) stay is decided in rank_allocation.py.

Source:  Zhang et al. 2023, arXiv:2303.10512, section 3.1; the scale is PEFT's
"""

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.layers.base_weight import compute_dtype
from fastpeft.layers.linear_adapter import LinearAdapter, check_adapter_name, tensor_factory
from fastpeft.layers.lora_settings import check_rank
from fastpeft.ops.lora import lora_linear

INIT_STD = 0.02
RANK_EPS = 1e-5
"""PEFT adds it to the rank that divides lora_alpha."""


class AdaLoRALinear(LinearAdapter):
    """A linear module with AdaLoRA: a drop-in for the linear that it wraps.

    Shapes:  x [..., K] -> y [..., N]; A [R, K], E [R, 1], B [N, R], with R = r, the rank before any triple is switched off
    Bases:   nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt
    Dtypes:  A, E, B are float32 over a float16, bfloat16 or quantised base (autocast_adapter_dtype), else the base's dtype. A E
             is taken in it; it and B are rounded to x's dtype for the products (ops/lora.py)
    Grads:   x, A, E, B, and the base's bias if it requires one; the base's weight is frozen
    Init:    E zero, so the wrapped module's function is unchanged; A, B ~ N(0, 0.02^2). False: all three ~ N(0, 1)
    Units:   lora_alpha counts as r where it is not positive
    impl:    implementation of the op: "auto", "torch", "triton", "reference"
    frozen:  for inference: no state of a training is kept until a training begins
    Raises:  TypeError for a base module that is not linear; ValueError for r < 1 or dropout outside [0, 1)

    >>> layer = AdaLoRALinear(nn.Linear(64, 64), r=12, lora_alpha=32)
    """

    adapter_attributes = ("lora_A", "lora_B", "lora_E")
    settings_attributes = ("scaling", "lora_dropout", "frozen", "importance")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 12,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        adapter_name: str = "default",
        init_lora_weights: bool = True,
        frozen: bool = False,
        autocast_adapter_dtype: bool = True,
        impl: str = "auto",
    ):
        check_rank("AdaLoRALinear", r, lora_alpha, lora_dropout)
        check_adapter_name("AdaLoRALinear", adapter_name)
        super().__init__(base_layer, impl)
        factory = tensor_factory(base_layer, autocast_adapter_dtype)
        std = INIT_STD if init_lora_weights else 1.0
        a = torch.randn(r, self.in_features, **factory) * std
        e = torch.zeros(r, 1, **factory) if init_lora_weights else torch.randn(r, 1, **factory)
        b = torch.randn(self.out_features, r, **factory) * std
        self.lora_A = nn.ParameterDict({adapter_name: nn.Parameter(a)})
        self.lora_B = nn.ParameterDict({adapter_name: nn.Parameter(b)})
        self.lora_E = nn.ParameterDict({adapter_name: nn.Parameter(e)})
        self.lora_dropout = nn.ModuleDict({adapter_name: nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()})
        self.scaling = {adapter_name: (lora_alpha if lora_alpha > 0 else r) / (r + RANK_EPS)}
        self.frozen = {adapter_name: frozen}
        self.importance: dict[str, dict[str, torch.Tensor]] = {}  # of every element, while ranks are allocated
        self.freeze_base()
        self.set_adapter(adapter_name)

    def _dropout_p(self, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    # -- forward ----------------------------------------------------------------------------------------------------------

    def compute(self, names: list[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if names and self.base_is_plain():
            first, *names = names
            wanted = compute_dtype(self.base_layer, x.dtype)
            y = lora_linear(
                x.to(wanted),
                self.frozen_weight(),
                self.lora_A[first] * self.lora_E[first],
                self.lora_B[first],
                self.base_layer.bias,
                scale=self.scaling[first],
                dropout_p=self._dropout_p(first),
                impl=self.impl,
            ).to(x.dtype)
        else:
            y = self.base_forward(x, *args, **kwargs)
        for name in names:
            y = y + self._update(x, name).to(y.dtype)
        return y

    def _update(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """What one adapter adds to the base's output, for what cannot go into the base's op."""
        a, b = self.lora_A[name] * self.lora_E[name], self.lora_B[name]
        dropped = F.dropout(x, self._dropout_p(name)).to(a.dtype)
        return F.linear(F.linear(dropped, a), b) * self.scaling[name]

    # -- merging ----------------------------------------------------------------------------------------------------------

    def delta_weight(self, name: str) -> torch.Tensor:
        """s B (A E), in the base weight's layout, in float32 or wider."""
        wide = torch.promote_types(self.lora_A[name].dtype, torch.float32)
        a, b = (self.lora_A[name] * self.lora_E[name]).to(wide), self.lora_B[name].to(wide)
        delta = (b @ a).mul_(self.scaling[name])
        return delta.t() if self.fan_in_fan_out else delta

    # -- training ---------------------------------------------------------------------------------------------------------

    def importance_of(self, name: str) -> dict[str, torch.Tensor]:
        """The running means that rank_allocation.py keeps, by "lora_A.exp_avg_ipt" and so on; zeros at first."""
        held = self.importance.setdefault(name, {})
        for attribute in self.adapter_attributes:
            parameter = getattr(self, attribute)[name]
            for kind in ("exp_avg_ipt", "exp_avg_unc"):
                key = f"{attribute}.{kind}"
                held[key] = held[key].to(parameter.device) if key in held else torch.zeros_like(parameter.detach())
        return held

    def training_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The running means, and A, B, E with the triples that are switched off: these can come back, so files lack them."""
        if name not in self.lora_A or (self.frozen[name] and name not in self.importance):
            return {}
        return {key: tensor.detach() for key, tensor in self.adapter_tensors(name).items()} | self.importance_of(name)
