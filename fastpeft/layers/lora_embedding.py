"""LoRA over an embedding module.

    y = W[ids] + sum over active adapters of s (A^T)[ids] B^T

Source:  Hu et al. 2021, arXiv:2106.09685
"""

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.layers.linear_adapter import tensor_factory
from fastpeft.layers.lora_init import InitLoraWeights
from fastpeft.layers.lora_settings import LoRALayer


class LoRAEmbedding(LoRALayer):
    """An embedding with LoRA: a drop-in for the nn.Embedding that it wraps.

        y = W[ids] + s (A^T)[ids] B^T,    times the base's own embed_scale where it has one (Gemma 3)

    Shapes:  ids [...] integers below V -> y [..., D]; A [r, V], B [D, r]
    Init:    True: A zero, B ~ N(0, 1) as in PEFT (the wrapped module's function is unchanged); False: both ~ N(0, 1);
             what starts a linear module in another way starts an embedding as True does
    Raises:  TypeError for a base module that is not an nn.Embedding; ValueError for r < 1
    """

    adapter_attributes = ("lora_embedding_A", "lora_embedding_B")
    delta_is_transposed = True

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
        factory = tensor_factory(base_layer, autocast_adapter_dtype)
        a = torch.zeros(r, vocabulary, **factory) if init_lora_weights else torch.randn(r, vocabulary, **factory)
        self.lora_embedding_A = nn.ParameterDict({adapter_name: nn.Parameter(a)})
        self.lora_embedding_B = nn.ParameterDict({adapter_name: nn.Parameter(torch.randn(dim, r, **factory))})
        base_layer.weight.requires_grad_(False)
        self.set_adapter(adapter_name)

    def lora_pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def compute(self, names: list[str], ids: torch.Tensor) -> torch.Tensor:
        """The base's rows, with the updates of these adapters."""
        y, base = self.base_layer(ids), self.base_layer
        options = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)
        for name in names:
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
