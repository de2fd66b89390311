"""BOFT: the input of a linear goes through butterfly factors of rotations (Liu et al. 2024, arXiv:2311.06243)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import weight_shape
from fastpeft.layers.boft import BOFTLinear, boft_blocks
from fastpeft.methods.targeted import LayerwiseConfig, require_linear


@dataclass
class BOFTConfig(LayerwiseConfig):
    """Options of BOFT, by PEFT's names.

    Raises:  ValueError for a value outside its range, and, when an adapter is added, for blocks that do not fit a module's inputs
    """

    peft_type: ClassVar[str] = "BOFT"
    shown_elsewhere: ClassVar[frozenset[str]] = LayerwiseConfig.shown_elsewhere | {
        "boft_block_size",
        "boft_block_num",
        "boft_n_butterfly_factor",
        "boft_dropout",
        "init_weights",
    }

    boft_block_size: int = 4
    """Size of the blocks; 0: by boft_block_num."""
    boft_block_num: int = 0
    """Number of blocks of every module; 0: by boft_block_size."""
    boft_n_butterfly_factor: int = 1
    """Number of factors; each but the first joins twice as distant inputs. PEFT takes 1 where its CUDA extension is missing."""
    boft_dropout: float = 0.0
    """Part of the blocks of one factor that is the identity in a training step."""
    fan_in_fan_out: bool = False
    """Some adapted weight is stored [in, out] (GPT-2's Conv1D); found out by itself."""
    bias: Literal["none", "all", "boft_only"] = "none"
    """Which biases of the base model are trained too."""
    init_weights: bool = True
    """Start with no rotation; False: random."""

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("boft_block_size", 0), ("boft_block_num", 0), ("boft_n_butterfly_factor", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"BOFTConfig: expected {name} a whole number, at least {least}, got {value!r}")
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise ValueError(
                "BOFTConfig: expected one of boft_block_size and boft_block_num and 0 for the other, got "
                f"{self.boft_block_size} and {self.boft_block_num}; their product is a module's number of inputs"
            )
        if not 0 <= self.boft_dropout < 1:
            raise ValueError(f"BOFTConfig: expected boft_dropout from 0 to less than 1, got {self.boft_dropout}")

    @classmethod
    def bias_choices(cls) -> tuple[str, ...]:
        return ("none", "all", "boft_only")

    def from_disk(self, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """PEFT without its CUDA extension trains and saves the first factor alone, whatever it was asked for: the others rotate
        by nothing."""
        whole = dict(found)
        for key, tensor in found.items():
            own = expected.get(key)
            if key.endswith(".boft_R") and own is not None and tensor.dim() == 4 and len(tensor) == 1 < len(own):
                whole[key] = torch.cat([tensor, tensor.new_zeros(len(own) - 1, *tensor.shape[1:])])
        return whole

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        require_linear("BOFTConfig", path, module)
        sizes = self.boft_block_size, self.boft_block_num, self.boft_n_butterfly_factor
        boft_blocks(f"BOFTConfig: {path}", weight_shape(module)[1], *sizes)
        return BOFTLinear(
            module,
            *sizes,
            self.boft_dropout,
            adapter_name=adapter_name,
            init_weights=self.init_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
