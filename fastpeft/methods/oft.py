"""OFT: the input of a linear is rotated by learned orthogonal blocks (Qiu et al. 2023, arXiv:2306.07280)."""

import re
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import weight_shape
from fastpeft.layers.oft import OFTLinear, oft_blocks
from fastpeft.methods.targeted import LayerwiseConfig, require_linear

NEUMANN_SINCE = (0, 18)
"""The version of PEFT from which the Cayley-Neumann series is the one here."""


@dataclass
class OFTConfig(LayerwiseConfig):
    """Options of OFT, by PEFT's names.

    Raises:  ValueError for a value outside its range, and, when an adapter is added, for blocks that do not divide a module's
             inputs. PEFT takes the nearest size that does instead, without saving it; its adapters are read likewise
    """

    peft_type: ClassVar[str] = "OFT"
    shown_elsewhere: ClassVar[frozenset[str]] = LayerwiseConfig.shown_elsewhere | {
        "r",
        "oft_block_size",
        "module_dropout",
        "init_weights",
    }

    r: int = 0
    """Number of blocks of every module; 0: by oft_block_size."""
    oft_block_size: int = 32
    """Size of the blocks; 0: by r."""
    module_dropout: float = 0.0
    """Part of the blocks that is the identity in a training step."""
    fan_in_fan_out: bool = False
    """Some adapted weight is stored [in, out] (GPT-2's Conv1D); found out by itself."""
    bias: Literal["none", "all", "oft_only"] = "none"
    """Which biases of the base model are trained too."""
    init_weights: bool = True
    """Start with no rotation; False: random."""
    coft: bool = False
    """Keep every rotation within eps of none."""
    eps: float = 6e-5
    """How far coft lets a rotation go."""
    block_share: bool = False
    """One block for all of a module's blocks."""
    use_cayley_neumann: bool = True
    """Approximate the rotation by a series in place of solving for it."""
    num_cayley_neumann_terms: int = 5
    """Terms of the series."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("r", "oft_block_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"OFTConfig: expected {name} a whole number, at least 0, got {value!r}")
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError(
                f"OFTConfig: expected one of r and oft_block_size and 0 for the other, got r={self.r} and "
                f"oft_block_size={self.oft_block_size}; their product is a module's number of inputs"
            )
        if not 0 <= self.module_dropout < 1:
            raise ValueError(f"OFTConfig: expected module_dropout from 0 to less than 1, got {self.module_dropout}")
        if not self.eps > 0:
            raise ValueError(f"OFTConfig: expected eps above 0, got {self.eps}")
        if self.num_cayley_neumann_terms < 2:
            raise ValueError(
                f"OFTConfig: expected num_cayley_neumann_terms at least 2, got {self.num_cayley_neumann_terms}; "
                "the first is no rotation"
            )
        self._adjusts = False  # True for an adapter file: PEFT saves the size that was asked for

    @classmethod
    def bias_choices(cls) -> tuple[str, ...]:
        return ("none", "all", "oft_only")

    def to_dict(self) -> dict[str, Any]:
        """With PEFT's version whose series this is: without it, PEFT warns that the series may be an older one."""
        return super().to_dict() | {"peft_version": f"{NEUMANN_SINCE[0]}.{NEUMANN_SINCE[1]}.0"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OFTConfig":
        if "oft_block_size" not in values:
            raise NotImplementedError(
                "OFTConfig: the adapter has no oft_block_size, so it is of PEFT 0.13 or older, which computed other rotations; "
                "train it anew"
            )
        version = tuple(int(part) for part in re.findall(r"\d+", str(values.get("peft_version", "0")))[:2])
        if values.get("use_cayley_neumann") and version < NEUMANN_SINCE:
            warnings.warn(
                "OFTConfig: the adapter was saved by a PEFT older than 0.18, whose Cayley-Neumann series had other terms; "
                "its rotations differ slightly",
                stacklevel=2,
            )
        config = super().from_dict(values)
        config._adjusts = True
        return config

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        require_linear("OFTConfig", path, module)
        if not self._adjusts:
            _, in_features = weight_shape(module)
            oft_blocks(f"OFTConfig: {path}", in_features, self.r, self.oft_block_size)
        return OFTLinear(
            module,
            r=self.r,
            oft_block_size=self.oft_block_size,
            adapter_name=adapter_name,
            adjust_blocks=self._adjusts,
            block_share=self.block_share,
            coft=self.coft,
            eps=self.eps,
            use_cayley_neumann=self.use_cayley_neumann,
            num_cayley_neumann_terms=self.num_cayley_neumann_terms,
            module_dropout=self.module_dropout,
            init_weights=self.init_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
