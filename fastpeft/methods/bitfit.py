"""BitFit: only the biases that the model has are trained (Ben Zaken et al. 2022, arXiv:2106.10199). PEFT lacks it."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targeted import TargetedConfig
from fastpeft.methods.targets import (
    ALL_LINEAR,
    NoTargetError,
    find_targets,
    is_inside,
    linear_paths,
    matcher,
    names_peft_agrees_on,
)


def is_norm(module: nn.Module) -> bool:
    """True for a LayerNorm, RMSNorm or their like: torch's, and transformers' by their class names."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and "norm" in type(module).__name__.lower()


@dataclass
class BitFitConfig(TargetedConfig):
    """Options of BitFit. The biases are trained in place, in the base's dtype; no module is wrapped.

    Several adapters may train the same biases: the model holds those of the active one.
    Raises:  NoTargetError, when an adapter is added, where the model has nothing of what is to be trained
    """

    peft_type: ClassVar[str] = "BITFIT"
    known_to_peft: ClassVar[bool] = False
    may_share_parameters: ClassVar[bool] = True

    target_modules: list[str] | str | None = None
    """Modules whose biases are trained: last components of names, a regular expression for whole paths, "all-linear"; None for
    every bias of the model."""
    train_layernorm: bool = False
    """Train the weights of norms too, of all that exclude_modules does not name."""

    def for_model(self, model: nn.Module) -> "BitFitConfig":
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            return dataclasses.replace(self, target_modules=linear_paths(model, self.task_type))
        return self

    def target_paths(self, model: nn.Module, *, strict: bool = True) -> list[str]:
        """No module is wrapped. Raises NoTargetError where target_modules names what does not exist."""
        if self.target_modules is not None:
            find_targets(model, self.target_modules, exclude_modules=self.exclude_modules, strict=strict)
        return []

    def trained_parameters(
        self, modules: dict[str, nn.Module], wrapped: list[str], copied: list[str]
    ) -> dict[str, nn.Parameter]:
        chosen = matcher(self.target_modules) if self.target_modules is not None else lambda path: True
        excluded = matcher(self.exclude_modules, "exclude_modules") if self.exclude_modules else lambda path: False
        found: dict[str, nn.Parameter] = {}
        for path, module in modules.items():
            if excluded(path) or is_inside(path, copied):
                continue
            for name, parameter in module._parameters.items():
                bias = (name == "bias" or name.endswith("_bias")) and chosen(path)
                norm = name == "weight" and self.train_layernorm and is_norm(module)
                if parameter is not None and parameter.is_floating_point() and (bias or norm):
                    found[f"{path}.{name}" if path else name] = parameter
        if not found:
            where = "the model" if self.target_modules is None else f"target_modules={self.target_modules!r}"
            norms = sorted({path.rpartition(".")[2] for path, module in modules.items() if is_norm(module)})
            advice = f"train_layernorm=True trains the norms {norms}" if norms else "name other modules"
            raise NoTargetError(
                f"BitFitConfig: expected biases to train, got none in {where}; {advice}, or use a method that adds its own "
                "parameters, such as LoraConfig"
            )
        return found

    def resolved(self, model: nn.Module, paths: list[str]) -> "BitFitConfig":
        config = PeftConfig.resolved(self, model, paths)
        saved = names_peft_agrees_on(model, [*(config.modules_to_save or []), *config.heads_to_save()])
        return dataclasses.replace(config, modules_to_save=saved or None)
