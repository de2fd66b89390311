"""LoRA: W stays frozen and s B A, of rank r, is learned beside it (Hu et al. 2021, arXiv:2106.09685)."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import is_conv1d, is_linear_base
from fastpeft.layers.lora import LoRALinear
from fastpeft.layers.lora_embedding import LoRAEmbedding
from fastpeft.layers.lora_settings import check_rank
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targets import ALL_LINEAR, check_pattern, find_targets, names_peft_agrees_on

BIAS_CHOICES = ("none", "all", "lora_only")


@dataclass
class LoraConfig(PeftConfig):
    """Options of LoRA, by PEFT's names.

    Raises:  ValueError for a value outside its range; NotImplementedError for an option of PEFT that is not here
    """

    peft_type: ClassVar[str] = "LORA"
    unsupported: ClassVar[dict[str, tuple]] = {
        "use_qalora": (False, None),
        "use_bdlora": (None, False),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
        "layer_replication": (None, []),
        "alora_invocation_tokens": (None,),
        "arrow_config": (None,),
        "kasa_config": (None,),
        "monteclora_config": (None,),
        "velora_config": (None,),
        "megatron_config": (None,),
    }

    shown_elsewhere: ClassVar[frozenset[str]] = PeftConfig.shown_elsewhere | {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "lora_dropout",
        "init_lora_weights",
    }

    r: int = 8
    """Rank of the update."""
    target_modules: list[str] | str | None = None
    """Names of the modules to adapt (last components), a regular expression for whole paths, "all-linear", or None for the
    architecture's usual ones."""
    exclude_modules: list[str] | str | None = None
    """Names, or a regular expression, of modules to leave alone."""
    lora_alpha: float = 8
    """Numerator of the scale: s = lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability that an element of the adapter's input is dropped in training."""
    fan_in_fan_out: bool = False
    """True if the weights are stored [in, out] (GPT-2's Conv1D); found out by itself."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained too."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    use_dora: bool = False
    """Learn the lengths of the rows of W + s B A beside their direction (DoRA); linear modules only."""
    modules_to_save: list[str] | None = None
    """Names of modules that are trained in full and saved with the adapter, such as a new head."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """True: A Kaiming-uniform, B zero; "gaussian": A normal, B zero; False: both random."""
    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; None for all."""
    layers_pattern: list[str] | str | None = None
    """Name of the module list that layers_to_transform counts in, such as "layers" or "h"."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single modules: the first key that matches the end of a path, as a regular expression, wins."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """lora_alpha of single modules, likewise."""
    lora_bias: bool = False
    """Give the B matrix a bias, scaled like its product."""

    def __post_init__(self):
        super().__post_init__()
        check_rank("LoraConfig", self.r, self.lora_alpha, self.lora_dropout)
        self.rank_pattern = self._numbers_by_pattern("rank_pattern")
        self.alpha_pattern = self._numbers_by_pattern("alpha_pattern")
        self.target_modules = self._names("target_modules", may_be_pattern=True)
        self.exclude_modules = self._names("exclude_modules", may_be_pattern=True)
        self.layers_pattern = self._names("layers_pattern", may_be_pattern=True)
        self.modules_to_save = self._names("modules_to_save")
        if self.bias not in BIAS_CHOICES:
            raise ValueError(f"LoraConfig: expected bias one of {BIAS_CHOICES}, got {self.bias!r}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise NotImplementedError(
                f"LoraConfig: expected init_lora_weights True, False or 'gaussian', got {self.init_lora_weights!r}"
            )
        if self.lora_bias and self.init_lora_weights == "gaussian":
            raise ValueError(
                "LoraConfig: expected init_lora_weights True or False with lora_bias, got 'gaussian'; PEFT loads no such adapter"
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("LoraConfig: expected use_dora or lora_bias, got both; DoRA has no bias of its own")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("LoraConfig: expected target_modules with at least one name, got an empty one")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("LoraConfig: layers_pattern says where layers_to_transform counts; give that too")
        is_pattern = isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR
        if is_pattern and self.layers_to_transform is not None:
            raise ValueError("LoraConfig: layers_to_transform needs target_modules as a list, got a regular expression")
        layers = self.layers_to_transform
        numbers = layers if isinstance(layers, (list, tuple)) else [] if layers is None else [layers]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"LoraConfig: expected layers_to_transform a number or a list of numbers, got {layers!r}")
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []:
            check_pattern("LoraConfig: layers_pattern", pattern)

    def _names(self, field: str, *, may_be_pattern: bool = False) -> list[str] | str | None:
        """A list of names, sorted where it came as a set or tuple; or a regular expression, if the field may be one."""
        value = getattr(self, field)
        if value is None:
            return None
        if isinstance(value, str) and may_be_pattern:
            check_pattern(f"LoraConfig: {field}", value)
            return value
        if not isinstance(value, (list, set, tuple, frozenset)) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"LoraConfig: expected {field} a list of names, got {value!r}")
        return value if isinstance(value, list) else sorted(value)

    def _numbers_by_pattern(self, field: str) -> dict[str, Any]:
        """Ranks or alphas by regular expression. Adapter files may say null for none."""
        values = getattr(self, field) or {}
        if not isinstance(values, dict):
            raise ValueError(f"LoraConfig: expected {field} a mapping from patterns to numbers, got {values!r}")
        for pattern, number in values.items():
            where = f"LoraConfig: {field}[{pattern!r}]"
            check_pattern(where, pattern)
            rank, alpha = (number, self.lora_alpha) if field == "rank_pattern" else (self.r, number)
            check_rank(where, rank, alpha, self.lora_dropout)
        return values

    def target_paths(self, model: nn.Module, *, strict: bool = True) -> list[str]:
        return find_targets(
            model,
            self.target_modules,
            task_type=self.task_type,
            exclude_modules=self.exclude_modules,
            modules_to_save=[*(self.modules_to_save or []), *self.heads_to_save()],
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            strict=strict,
        )

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        options: dict[str, Any] = {
            "r": _by_pattern(self.rank_pattern, path, self.r),
            "lora_alpha": _by_pattern(self.alpha_pattern, path, self.lora_alpha),
            "adapter_name": adapter_name,
            "use_rslora": self.use_rslora,
            "init_lora_weights": self.init_lora_weights,
            "autocast_adapter_dtype": autocast_adapter_dtype,
        }
        if isinstance(module, nn.Embedding):
            if self.lora_bias:
                raise ValueError(f"LoraConfig: lora_bias is for linear modules, got the embedding {path}; leave it out")
            if self.use_dora:
                raise NotImplementedError(
                    f"LoraConfig: use_dora is for linear modules, got the embedding {path}; leave it out"
                )
            return LoRAEmbedding(module, **options)
        if is_linear_base(module):
            options |= {"lora_dropout": self.lora_dropout, "lora_bias": self.lora_bias, "use_dora": self.use_dora}
            return LoRALinear(module, **options)
        raise ValueError(
            f"target_modules: expected nn.Linear, nn.Embedding or transformers' Conv1D, got {type(module).__name__} at {path}; "
            "name the linear modules inside it"
        )

    def resolved(self, model: nn.Module, paths: list[str]) -> "LoraConfig":
        config = super().resolved(model, paths)
        named = config.target_modules
        if named is None:
            named = sorted({path.rpartition(".")[2] for path in paths})
        elif isinstance(named, str) and named.lower() == ALL_LINEAR:
            named = list(paths)
        conv1d = any(is_conv1d(getattr(m, "base_layer", m)) for m in map(model.get_submodule, paths))
        saved = names_peft_agrees_on(model, [*(config.modules_to_save or []), *config.heads_to_save()])
        return dataclasses.replace(config, target_modules=named, fan_in_fan_out=conv1d, modules_to_save=saved or None)


def _by_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches the path's end at a component boundary, as PEFT does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
