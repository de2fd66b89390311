"""OFT: the input of a linear is rotated by learned orthogonal blocks (Qiu et al. 2023, arXiv:2306.07280)."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from fastpeft.layers.linear_adapter import LinearAdapter, check_adapter_name, tensor_factory
from fastpeft.ops.block_rotation import cayley, cayley_neumann, rotate_blocks, skew_from_upper, upper_indices


def nearest_divisor(whole: int, number: int) -> int:
    """The divisor of `whole` that PEFT takes in place of `number`: the nearest, the lower one of two."""
    if number >= whole:
        return whole
    lower = next(n for n in range(number, 0, -1) if whole % n == 0)
    higher = next(n for n in range(number, whole + 1) if whole % n == 0)
    return lower if number - lower <= higher - number else higher


def oft_blocks(where: str, in_features: int, r: int, oft_block_size: int, adjust: bool = False) -> tuple[int, int]:
    """(number, size) of the blocks; exactly one of r and oft_block_size is not 0. adjust: take the nearest divisor, as PEFT.

    Raises:  ValueError if the given one does not divide in_features, naming the nearest that do
    """
    field, given = ("r", r) if r else ("oft_block_size", oft_block_size)
    if in_features % given:
        if not adjust:
            lower = max(n for n in range(1, min(given, in_features) + 1) if in_features % n == 0)
            higher = [n for n in range(given, in_features + 1) if in_features % n == 0][:1]
            nearest = " or ".join(map(str, [lower, *higher]))
            raise ValueError(
                f"{where}: expected {field} a divisor of in_features={in_features}, got {given}; take {nearest}"
            )
        given = nearest_divisor(in_features, given)
    return (given, in_features // given) if r else (in_features // given, given)


class OFTRotation(nn.Module):
    """The blocks R of one adapter. weight holds the strict upper triangles of the skew-symmetric Q, row by row.

        R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4   (num_cayley_neumann_terms=5),   or exactly (I - Q) (I + Q)^-1

    Shapes:  weight [b, C (C - 1) / 2] -> R [b, C, C]; with block_share b is 1
    coft:    Q is kept within a ball: |Q_i| <= eps / sqrt(b). In training the weight itself is moved there, as PEFT does it;
             its gradient is that of a weight that was there already.
    module_dropout: in training so large a part of the blocks, rounded down, is the identity. PEFT 0.21 has the option and
             does not use it.
    """

    def __init__(
        self,
        blocks: int,
        size: int,
        *,
        coft: bool,
        eps: float,
        use_cayley_neumann: bool,
        num_cayley_neumann_terms: int,
        module_dropout: float,
        **factory,
    ):
        super().__init__()
        self.size = size
        self.coft, self.eps, self.module_dropout = coft, eps, module_dropout
        self.use_cayley_neumann, self.num_cayley_neumann_terms = use_cayley_neumann, num_cayley_neumann_terms
        self.weight = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2, **factory))
        self.register_buffer("upper", upper_indices(size).to(factory.get("device")), persistent=False)

    @torch.no_grad()
    def projected(self) -> torch.Tensor:
        """The weight, every block outside the ball moved to its surface."""
        limit = self.eps / math.sqrt(len(self.weight))
        norm = math.sqrt(2) * self.weight.norm(dim=1, keepdim=True)  # of Q, which has every value twice
        slack = 1 + 4 * torch.finfo(norm.dtype).eps  # what has been moved there is not moved again
        return torch.where(norm <= limit * slack, self.weight, limit * (self.weight / norm))

    def _upper(self) -> torch.Tensor:
        if not self.coft:
            return self.weight
        projected = self.projected()
        if self.training:
            with torch.no_grad():
                self.weight.copy_(projected)
            return self.weight
        return self.weight + (projected - self.weight).detach()

    def blocks(self) -> torch.Tensor:
        """R [b, C, C] in float32 or wider."""
        upper = self._upper()
        q = skew_from_upper(upper.to(torch.promote_types(upper.dtype, torch.float32)), self.size, self.upper)
        return cayley_neumann(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(q)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] rotated."""
        blocks = self.blocks()
        dropped = int(self.module_dropout * len(blocks)) if self.training and len(blocks) > 1 else 0
        if dropped:
            chosen = torch.randperm(len(blocks), device=blocks.device)[:dropped]
            eye = torch.eye(self.size, device=blocks.device, dtype=blocks.dtype)
            blocks = blocks.index_copy(0, chosen, eye.expand(dropped, -1, -1))
        return rotate_blocks(x, blocks)

    def extra_repr(self) -> str:
        return f"blocks={len(self.weight)}, size={self.size}, coft={self.coft}, neumann={self.use_cayley_neumann}"


class OFTLinear(LinearAdapter):
    """A linear module whose input is rotated by blocks.

        y = (x blockdiag(R_1, ..., R_b)) W^T + bias

    Shapes:  x [..., K] -> y [..., N]; weight [b, C (C - 1) / 2], b C = K; with block_share [1, C (C - 1) / 2]
    Bases:   nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt
    Dtypes:  weight is float32 over a float16, bfloat16 or quantised base (autocast_adapter_dtype), else the base's dtype; x is
             rotated in its own dtype (ops/block_rotation.py)
    Init:    zeros, so that R = I; init_weights=False: normal with standard deviation 0.1
    Several: the first active adapter rotates first
    Raises:  ValueError if r or oft_block_size does not divide K
    """

    adapter_attributes = ("oft_R",)
    settings_attributes = ("r", "oft_block_size")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 0,
        oft_block_size: int = 32,
        *,
        adapter_name: str = "default",
        adjust_blocks: bool = False,
        block_share: bool = False,
        coft: bool = False,
        eps: float = 6e-5,
        use_cayley_neumann: bool = True,
        num_cayley_neumann_terms: int = 5,
        module_dropout: float = 0.0,
        init_weights: bool = True,
        autocast_adapter_dtype: bool = True,
        impl: str = "auto",
    ):
        check_adapter_name("OFTLinear", adapter_name)
        super().__init__(base_layer, impl)
        count, size = oft_blocks("OFTLinear", self.in_features, r, oft_block_size, adjust_blocks)
        rotation = OFTRotation(
            1 if block_share else count,
            size,
            coft=coft,
            eps=eps,
            use_cayley_neumann=use_cayley_neumann,
            num_cayley_neumann_terms=num_cayley_neumann_terms,
            module_dropout=module_dropout,
            **tensor_factory(base_layer, autocast_adapter_dtype),
        )
        if not init_weights:
            nn.init.normal_(rotation.weight, std=0.1)
        self.oft_R = nn.ModuleDict({adapter_name: rotation})
        self.r, self.oft_block_size = {adapter_name: count}, {adapter_name: size}
        self.freeze_base()
        self.set_adapter(adapter_name)

    def compute(self, names: list[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        for name in names:
            x = self.oft_R[name](x)
        return self.base_forward(x, *args, **kwargs)

    def merged_tensors(self, names: Iterable[str], weight: torch.Tensor, bias: torch.Tensor | None):
        """x R_a R_b W^T is x (W R_b^T R_a^T)^T: the last rotation comes to the weight first."""
        return super().merged_tensors(list(names)[::-1], weight, bias)

    def merge_into(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None):
        """W blockdiag(R)^T."""
        blocks = self.oft_R[name].blocks().to(weight.dtype).transpose(1, 2)
        if self.fan_in_fan_out:
            return rotate_blocks(weight.t(), blocks).t().contiguous(), bias
        return rotate_blocks(weight, blocks), bias
