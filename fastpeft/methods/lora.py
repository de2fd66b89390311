"""LoRA: W stays frozen and s B A, of rank r, is learned beside it (Hu et al. 2021, arXiv:2106.09685)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import is_linear_base
from fastpeft.layers.lora import LoRALinear
from fastpeft.layers.lora_embedding import LoRAEmbedding
from fastpeft.layers.lora_init import InitLoraWeights, changes_base, check_init, check_loftq
from fastpeft.layers.lora_parameters import LoRAParameters
from fastpeft.layers.lora_settings import check_rank
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targeted import LayerwiseConfig, by_pattern
from fastpeft.methods.targets import base_modules, check_pattern, owners_of_parameters, parameters_named


@dataclass
class LoftQConfig:
    """Options of init_lora_weights="loftq"."""

    loftq_bits: int = 4
    """4 (NF4 in blocks of 64) or 8 (a scale per row)."""
    loftq_iter: int = 1
    """How often the weight is quantised and the remainder decomposed."""


@dataclass
class EvaConfig:
    """Options of init_lora_weights="eva"; initialize_lora_eva_weights uses them."""

    rho: float = 2.0
    """A module's rank is at most rho r; the ranks' sum stays. 1 for no redistribution."""
    tau: float = 0.99
    """Cosine similarity of two estimates of a component at which it is taken as final."""
    use_label_mask: bool = True
    """Leave out tokens whose label is label_mask_value."""
    label_mask_value: int = -100
    """See use_label_mask."""
    whiten: bool = False
    """Divide a component by the square root of its singular value."""
    adjust_scaling_factors: bool = True
    """Let lora_alpha follow a redistributed rank, so that the scale stays."""

    def __post_init__(self):
        if not self.rho >= 1:
            raise ValueError(f"EvaConfig: expected rho >= 1, got {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"EvaConfig: expected 0 <= tau <= 1, got {self.tau!r}")


@dataclass
class LoraConfig(LayerwiseConfig):
    """Options of LoRA, by PEFT's names.

    Raises:  ValueError for a value outside its range; NotImplementedError for an option of PEFT that is not here
    """

    peft_type: ClassVar[str] = "LORA"
    unsupported: ClassVar[dict[str, tuple]] = {
        "use_qalora": (False, None),
        "use_bdlora": (None, False),
        "trainable_token_indices": (None,),
        "layer_replication": (None, []),
        "alora_invocation_tokens": (None,),
        "arrow_config": (None,),
        "kasa_config": (None,),
        "monteclora_config": (None,),
        "velora_config": (None,),
        "megatron_config": (None,),
    }

    shown_elsewhere: ClassVar[frozenset[str]] = LayerwiseConfig.shown_elsewhere | {
        "lora_bias",
        "lora_dropout",
        "target_parameters",
        "init_lora_weights",  # and see differences
        "eva_config",
    }

    target_parameters: list[str] | None = None
    """Names of parameters that a module multiplies by itself, such as "experts.gate_up_proj" of a mixture of experts: the ends of
    paths. Without target_modules these are adapted alone. layers_to_transform and exclude_modules do not choose among them."""
    r: int = 8
    """Rank of the update."""
    lora_alpha: float = 8
    """Numerator of the scale: s = lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability that an element of the adapter's input is dropped in training."""
    fan_in_fan_out: bool = False
    """True if the weights are stored [in, out] (GPT-2's Conv1D); found out by itself."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    use_dora: bool = False
    """Learn the lengths of the rows of W + s B A beside their direction (DoRA); linear modules only."""
    init_lora_weights: InitLoraWeights = True
    """True: A Kaiming-uniform, B zero; "gaussian": A normal, B zero; False: both random; "orthogonal"; "eva"; and with another
    base weight: "pissa", "pissa_niter_[n]", "olora", "loftq"."""
    loftq_config: dict[str, int] = field(default_factory=dict)
    """loftq_bits and loftq_iter of init_lora_weights "loftq"; or a LoftQConfig."""
    eva_config: Any = None
    """An EvaConfig, or its fields as a dictionary, for init_lora_weights "eva"; default: EvaConfig()."""
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
        self._check_init()
        self.target_parameters = self._names("target_parameters") or None
        for option in ("lora_dropout", "use_dora", "lora_bias"):
            if self.target_parameters and getattr(self, option):
                raise ValueError(
                    f"LoraConfig: expected target_parameters without {option}, got {option}={getattr(self, option)!r}; the "
                    "module multiplies by W + s B A itself"
                )
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                "LoraConfig: expected init_lora_weights True or False with lora_bias, got "
                f"{self.init_lora_weights!r}; PEFT loads no such adapter"
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("LoraConfig: expected use_dora or lora_bias, got both; DoRA has no bias of its own")

    def _check_init(self) -> None:
        kind = self.init_lora_weights
        for rank in [self.r, *self.rank_pattern.values()]:
            check_init("LoraConfig", kind, rank)
        options = self.loftq_config
        if dataclasses.is_dataclass(options):
            options = dataclasses.asdict(options)
        self.loftq_config = dict(options or {})
        if self.loftq_config and kind != "loftq":
            raise ValueError(f"LoraConfig: loftq_config is for init_lora_weights='loftq', got {kind!r}; leave it out")
        if kind == "loftq":
            bits, turns = check_loftq("LoraConfig", self.loftq_config)
            self.loftq_config = {"loftq_bits": bits, "loftq_iter": turns}
        if isinstance(self.eva_config, dict):
            self.eva_config = EvaConfig(**self.eva_config)
        if self.eva_config is None and kind == "eva":
            self.eva_config = EvaConfig()

    def differences(self, other: PeftConfig) -> list[str]:
        names = super().differences(other)
        if isinstance(other, LoraConfig):
            ours, theirs = self.init_lora_weights, other.init_lora_weights
            if ours != theirs and (changes_base(ours) or changes_base(theirs)):
                names.append("init_lora_weights")
        return names

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.eva_config is not None:
            values["eva_config"] = dataclasses.asdict(self.eva_config)
        return values

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
        if not self.target_parameters:
            return super().target_paths(model, strict=strict)
        owners = owners_of_parameters(model, self.target_parameters, strict=strict)
        paths = super().target_paths(model, strict=strict) if self.target_modules else []
        both = sorted(set(owners) & set(paths))
        if both:
            raise ValueError(f"target_parameters: {both} are in target_modules too; name them once")
        return [path for path in dict(base_modules(model)) if path in owners or path in paths]

    def resolved(self, model: nn.Module, paths: list[str]) -> "LoraConfig":
        if not self.target_parameters:
            return super().resolved(model, paths)
        owners = owners_of_parameters(model, self.target_parameters, strict=False)
        paths = [path for path in paths if path not in owners]
        config = self if paths else dataclasses.replace(self, target_modules=[])
        return super(LoraConfig, config).resolved(model, paths)

    def _wrap_parameters(self, path: str, module: nn.Module, names: list[str], options: dict[str, Any]) -> AdapterLayer:
        ranks = {
            name: tuple(
                by_pattern(patterns, f"{path}.{name}", default)
                for patterns, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.lora_alpha))
            )
            for name in names
        }
        return LoRAParameters(module, ranks, **options)

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        options: dict[str, Any] = {
            "adapter_name": adapter_name,
            "use_rslora": self.use_rslora,
            "init_lora_weights": self.init_lora_weights,
            "autocast_adapter_dtype": autocast_adapter_dtype,
        }
        if self.target_parameters and (names := parameters_named(path, module, self.target_parameters)):
            return self._wrap_parameters(path, module, names, options)
        options["r"] = by_pattern(self.rank_pattern, path, self.r)
        options["lora_alpha"] = by_pattern(self.alpha_pattern, path, self.lora_alpha)
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
            layer = LoRALinear(module, loftq_config=self.loftq_config, **options)
            layer.set_adapter([])  # until it is installed, the module holds its own weight
            return layer
        raise ValueError(
            f"target_modules: expected nn.Linear, nn.Embedding or transformers' Conv1D, got {type(module).__name__} at {path}; "
            "name the linear modules inside it"
        )
