"""A new LoRA adapter made of others: by PEFT's names and with PEFT's results."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastpeft.layers.adapter import ModulesToSaveWrapper
from fastpeft.layers.lora_init import changes_base
from fastpeft.layers.lora_settings import LoRALayer
from fastpeft.methods.lora import LoraConfig
from fastpeft.methods.targets import base_modules, names_module
from fastpeft.ops.mixing import MajoritySign, combine, low_rank
from fastpeft.tuner.injection import Injection
from fastpeft.tuner.merging import Tuner

# What a combination_type does with A and B one by one, or with the product s B A before it is decomposed again.
ON_FACTORS = {
    "linear": "sum",
    "ties": "ties",
    "dare_linear": "dare_sum",
    "dare_ties": "dare_ties",
    "magnitude_prune": "magnitude",
}
ON_PRODUCTS = {
    "svd": "sum",
    "ties_svd": "ties",
    "dare_linear_svd": "dare_sum",
    "dare_ties_svd": "dare_ties",
    "magnitude_prune_svd": "magnitude",
}
COMBINATIONS = (*ON_FACTORS, *ON_PRODUCTS, "cat")


class Mixture(NamedTuple):
    """What is to be mixed, and how; the fields are add_weighted_adapter's arguments."""

    adapters: list[str]
    weights: list[float]
    combination_type: str
    svd_rank: int | None
    svd_clamp: float | None
    svd_full_matrices: bool
    svd_driver: str | None
    density: float | None
    majority_sign_method: MajoritySign

    def check(self, tuner: Tuner) -> None:
        """Raise before anything has changed."""
        where = "add_weighted_adapter"
        tuner._known(self.adapters)
        if not self.adapters or len(self.adapters) != len(self.weights):
            raise ValueError(
                f"{where}: expected one weight for each adapter, got {self.adapters} and {list(self.weights)}"
            )
        if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"{where}: expected finite weights, got {list(self.weights)}")
        if self.combination_type not in COMBINATIONS:
            raise ValueError(f"{where}: expected combination_type one of {COMBINATIONS}, got {self.combination_type!r}")
        needs_density = any(part in self.combination_type for part in ("ties", "dare", "magnitude"))
        if needs_density and (self.density is None or not 0 < self.density <= 1):
            raise ValueError(f"{where}: expected 0 < density <= 1 with {self.combination_type!r}, got {self.density!r}")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(
                f"{where}: expected majority_sign_method 'total' or 'frequency', got {self.majority_sign_method!r}"
            )
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ValueError(f"{where}: expected svd_clamp a quantile from 0 to 1, got {self.svd_clamp!r}")
        for name in self.adapters:
            self._check_adapter(name, tuner.peft_config[name])
        for path, layer in tuner.layers():
            copies = [name for name in self.adapters if name in layer.adapter_names]
            if isinstance(layer, ModulesToSaveWrapper) and len(copies) > 1:
                raise ValueError(f"{where}: {copies} have full copies of {path} (modules_to_save), which do not add up")

    @staticmethod
    def _check_adapter(name: str, config: Any) -> None:
        if type(config) is not LoraConfig:
            raise NotImplementedError(
                f"add_weighted_adapter: expected LoRA adapters, got {name!r}, which is {config.peft_type}"
            )
        used = {
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
            "target_parameters": bool(getattr(config, "target_parameters", None)),
            "bias": config.bias != "none",
            f"init_lora_weights={config.init_lora_weights!r}": changes_base(config.init_lora_weights),
        }
        for option, present in used.items():
            if present:
                raise ValueError(
                    f"add_weighted_adapter: expected plain LoRA, got {name!r} with {option}; what it adds to a weight is not "
                    "s B A alone"
                )

    def rank(self, configs: list[LoraConfig]) -> int:
        """The new adapter's rank."""
        ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
        if self.combination_type == "cat":
            return sum(ranks)
        if self.combination_type in ON_PRODUCTS:
            return self.svd_rank or max(ranks)
        if len(set(ranks)) != 1:
            raise ValueError(
                f"add_weighted_adapter: expected adapters of one rank with {self.combination_type!r}, got "
                f"{dict(zip(self.adapters, ranks, strict=True))}; take 'cat' or an svd type"
            )
        return ranks[0]

    def values(self, layer: LoRALayer, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of the new adapter, whose scale is 1, in this layer."""
        names = [name for name in self.adapters if name in layer.adapter_names]
        weights = [self.weights[self.adapters.index(name)] for name in names]
        pairs = [layer.lora_pair(name) for name in names]
        if self.combination_type in ON_PRODUCTS:
            deltas = [layer.delta_weight(name) for name in names]
            delta = combine(
                ON_PRODUCTS[self.combination_type], deltas, torch.tensor(weights).to(deltas[0]), *self._how()
            )
            return low_rank(
                delta.t() if layer.delta_is_transposed else delta,
                r,
                clamp=self.svd_clamp,
                full_matrices=self.svd_full_matrices,
                driver=self.svd_driver,
            )
        scaled = [weight * layer.scaling[name] for name, weight in zip(names, weights, strict=True)]
        if self.combination_type == "cat":
            a = torch.cat([a * weight for (a, _), weight in zip(pairs, scaled, strict=True)])
            return a, torch.cat([b for _, b in pairs], dim=1)
        ranks = {name: a.shape[0] for name, (a, _) in zip(names, pairs, strict=True)}
        if len(set(ranks.values())) > 1:
            raise ValueError(
                f"add_weighted_adapter: expected one rank in each module with {self.combination_type!r}, got {ranks}; "
                "take 'cat' or an svd type"
            )
        method = ON_FACTORS[self.combination_type]
        signed = torch.tensor([math.sqrt(abs(weight)) * (1 if weight >= 0 else -1) for weight in scaled])
        a, b = ([pair[i] for pair in pairs] for i in (0, 1))
        mixed_a = combine(method, a, signed.to(a[0].device), *self._how())
        mixed_b = combine(method, b, signed.abs().to(b[0].device), *self._how())
        return mixed_a.to(a[0].dtype), mixed_b.to(b[0].dtype)

    def _how(self) -> tuple[float | None, MajoritySign]:
        return self.density, self.majority_sign_method


@torch.no_grad()
def prepare_mixture(tuner: Tuner, mixture: Mixture, adapter_name: str) -> Injection:
    """The new adapter beside the model, with its values.

    Raises:  ValueError, or NotImplementedError for adapters that are not LoRA
    """
    if len(mixture.adapters) == 1:
        mixture = mixture._replace(combination_type="linear")  # as in PEFT: nothing to combine
    mixture.check(tuner)
    configs = [tuner.peft_config[name] for name in mixture.adapters]
    r = mixture.rank(configs)
    wrapped = {
        path: layer
        for path, layer in tuner.layers()
        if isinstance(layer, LoRALayer) and any(name in layer.adapter_names for name in mixture.adapters)
    }
    config = dataclasses.replace(
        configs[0],
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        eva_config=None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        target_modules=_shortest_names(tuner, configs, list(wrapped)),
    )
    injection = tuner.prepare(adapter_name, config, autocast_adapter_dtype=True, strict=False)
    for path, layer in wrapped.items():
        a, b = mixture.values(layer, r)
        new_a, new_b = injection.layers[path].lora_pair(adapter_name)
        new_a.zero_()[: a.shape[0]] = a.to(new_a)
        new_b.zero_()[:, : b.shape[1]] = b.to(new_b)
    return injection


def _shortest_names(tuner: Tuner, configs: Sequence[LoraConfig], paths: list[str]) -> list[str]:
    """The adapters' own names for these modules if they mean exactly these, else the modules' paths."""
    named = [config.target_modules for config in configs]
    if all(isinstance(names, list) for names in named):
        names = sorted({name for some in named for name in some})
        meant = [path for path, _ in base_modules(tuner.model) if any(names_module(name, path) for name in names)]
        if meant == paths:
            return names
    return paths
