"""BOFT: the input of a linear is rotated by butterfly factors, its output is scaled (Liu et al. 2024, arXiv:2311.06243)."""

import torch
from torch import nn

from fastpeft.layers.base_weight import compute_dtype
from fastpeft.layers.linear_adapter import LinearAdapter, check_adapter_name, tensor_factory
from fastpeft.ops.block_rotation import cayley, rotate_blocks
from fastpeft.ops.frozen_linear import frozen_linear


def boft_blocks(where: str, in_features: int, size: int, count: int, factors: int) -> tuple[int, int]:
    """(number, size) of the blocks of every butterfly factor; exactly one of size and count is not 0.

    Raises:  ValueError if blocks and factors do not fit in_features
    """
    field, given = ("boft_block_size", size) if size else ("boft_block_num", count)
    if in_features % given:
        raise ValueError(f"{where}: expected {field} a divisor of in_features={in_features}, got {given}")
    size, count = (size, in_features // size) if size else (in_features // count, count)
    if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
        raise ValueError(
            f"{where}: expected blocks of even size, and a multiple of {2 ** (factors - 1)} of them for "
            f"boft_n_butterfly_factor={factors}, got {count} blocks of {size} for in_features={in_features}"
        )
    return count, size


def rotate_factor(x: torch.Tensor, rotation: torch.Tensor, i: int) -> torch.Tensor:
    """x M with M = P blockdiag(R) P^T of the butterfly's factor i = 0, 1, ...

    A block of P's order is half h of the block q and half h of the one 2^(i-1) blocks further: P_0 is the identity.
    Shapes:  x [..., K], rotation [b, C, C], b C = K -> y [..., K]
    """
    if i == 0:
        return rotate_blocks(x, rotation)
    half = rotation.shape[-1] // 2
    paired = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2).reshape(x.shape)
    turned = rotate_blocks(paired, rotation)
    return turned.unflatten(-1, (-1, 2**i, 2, half)).transpose(-3, -2).reshape(x.shape)


class BOFTLinear(LinearAdapter):
    """A linear module whose input goes through a butterfly of rotations and whose output is scaled.

        y = s * ((x M_m ... M_1) W^T) + bias,   M_i = P_i blockdiag(R_i1, ..., R_ib) P_i^T
        R = (I - Q) (I + Q)^-1,   Q = (A - A^T) / 2

    Shapes:  x [..., K] -> y [..., N]; boft_R (the A) [m, b, C, C], b C = K; boft_s [N, 1]
    Bases:   nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit and Linear8bitLt
    Dtypes:  boft_R, boft_s are float32 over a float16, bfloat16 or quantised base (autocast_adapter_dtype), else the base's
    Init:    A zero, s one: the wrapped module's function; init_weights=False: normal around these, standard deviation 0.1
    boft_dropout: in training so large a part of the blocks of one factor, drawn at random, is the identity
    Several: the last active adapter rotates first
    Raises:  ValueError if the blocks do not fit K
    """

    adapter_attributes = ("boft_R", "boft_s")
    settings_attributes = ("boft_block_size", "boft_block_num", "boft_dropout")

    def __init__(
        self,
        base_layer: nn.Module,
        boft_block_size: int = 4,
        boft_block_num: int = 0,
        boft_n_butterfly_factor: int = 1,
        boft_dropout: float = 0.0,
        *,
        adapter_name: str = "default",
        init_weights: bool = True,
        autocast_adapter_dtype: bool = True,
        impl: str = "auto",
    ):
        check_adapter_name("BOFTLinear", adapter_name)
        super().__init__(base_layer, impl)
        factors = boft_n_butterfly_factor
        count, size = boft_blocks("BOFTLinear", self.in_features, boft_block_size, boft_block_num, factors)
        factory = tensor_factory(base_layer, autocast_adapter_dtype)
        rotation, scale = (
            torch.zeros(factors, count, size, size, **factory),
            torch.ones(self.out_features, 1, **factory),
        )
        if not init_weights:
            nn.init.normal_(rotation, std=0.1)
            nn.init.normal_(scale, mean=1.0, std=0.1)
        self.boft_R = nn.ParameterDict({adapter_name: nn.Parameter(rotation)})
        self.boft_s = nn.ParameterDict({adapter_name: nn.Parameter(scale)})
        self.boft_block_size, self.boft_block_num = {adapter_name: size}, {adapter_name: count}
        self.boft_dropout = {adapter_name: boft_dropout}
        self.freeze_base()
        self.set_adapter(adapter_name)

    def rotations(self, name: str) -> torch.Tensor:
        """R [m, b, C, C] in float32 or wider."""
        a = self.boft_R[name]
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        return cayley((0.5 * (a - a.transpose(-1, -2))).flatten(0, 1)).view(a.shape)

    def _dropped(self, rotations: torch.Tensor, p: float) -> torch.Tensor:
        factors, count, size, _ = rotations.shape
        dropped = int(p * count) if self.training else 0
        if not dropped:
            return rotations
        device = rotations.device
        chosen = torch.randperm(count, device=device)[:dropped] + count * torch.randint(factors, (1,), device=device)
        eye = torch.eye(size, device=device, dtype=rotations.dtype).expand(dropped, -1, -1)
        return rotations.flatten(0, 1).index_copy(0, chosen, eye).view(rotations.shape)

    def compute(self, names: list[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        scale = None
        for name in reversed(names):
            rotations = self._dropped(self.rotations(name), self.boft_dropout[name])
            for i in reversed(range(len(rotations))):
                x = rotate_factor(x, rotations[i], i)
            own = self.boft_s[name].flatten()
            scale = own if scale is None else own * scale
        bias = self.base_layer.bias
        if scale is None:
            return self.base_forward(x, *args, **kwargs)
        if bias is None:
            y = self.base_forward(x, *args, **kwargs)
            return (y * scale).to(y.dtype)
        if self.base_is_plain():
            wanted = compute_dtype(self.base_layer, x.dtype)
            y = frozen_linear(x.to(wanted), self.frozen_weight(), impl=self.impl).to(x.dtype)
        else:
            y = self.base_layer(x, *args, **kwargs) - bias
        return (y * scale + bias).to(y.dtype)

    def merge_into(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None):
        """s W (M_m ... M_1)^T: the factors' transposes, last one first."""
        rows, rotations = weight.t() if self.fan_in_fan_out else weight, self.rotations(name).to(weight.dtype)
        for i, rotation in enumerate(rotations):
            rows = rotate_factor(rows, rotation.transpose(1, 2), i)
        rows = rows * self.boft_s[name].to(weight.dtype)
        return rows.t().contiguous() if self.fan_in_fan_out else rows, bias
