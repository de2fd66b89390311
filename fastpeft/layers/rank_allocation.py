"""Which triples of AdaLoRA's modules stay: the importance of every triple, and a budget for all modules together.

    importance of an element w      I = |w dL/dw|,   I~ = beta1 I~ + (1 - beta1) I,   U = beta2 U + (1 - beta2) |I - I~|
    importance of triple i          S_i = I~ U of E_i + mean over row i of A of I~ U + mean over column i of B of I~ U
    budget after step t             b(t) = b_T + (b_0 - b_T) (1 - (t - tinit) / (total - tfinal - tinit))^3, rounded down
                                    b_0 up to tinit, b_T from total - tfinal on
    penalty on the loss             mean over all A and B of ||A A^T - 1||_F and ||B^T B - 1||_F

b_0 is the number of all triples, b_T target_r times the number of modules. E of the b_0 - b(t) least important triples, and of
those that tie with them, is set to 0. Its gradient need not be, so a triple can come back until the last allocation.

Shapes:  A [R, K], E [R, 1], B [N, R]; a module's importance and mask [R]
Source:  Zhang et al. 2023, arXiv:2303.10512, section 3.2, algorithm 1; the order of the steps is PEFT's
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fastpeft.layers.adalora import AdaLoRALinear

Layers = Mapping[str, AdaLoRALinear]
"""The modules that share a budget, by path."""
RankPattern = dict[str, list[bool]]
"""Which triples of a module stay, by path."""


@dataclass(frozen=True)
class BudgetSchedule:
    """When how many triples stay. The fields are those of AdaLoraConfig.

    Units:  steps of the optimizer; init_budget and target_budget: triples of all modules together
    """

    init_budget: int
    target_budget: int
    tinit: int
    tfinal: int
    total_step: int
    deltaT: int

    @property
    def last(self) -> int:
        """The step of the last allocation."""
        return self.total_step - self.tfinal

    def budget(self, step: int) -> int:
        if step <= self.tinit:
            return self.init_budget
        if step >= self.last:
            return self.target_budget
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((self.init_budget - self.target_budget) * left**3 + self.target_budget)

    def allocates(self, step: int) -> bool:
        """True where the ranks are allocated anew after this step."""
        return step == self.last or (self.tinit < step < self.last and step % self.deltaT == 0)


@torch.no_grad()
def update_importance(layers: Layers, name: str, beta1: float, beta2: float) -> None:
    """Take the gradients of this step into the running means. A module without a gradient took no part: its I is 0.

    Raises:  ValueError where no module has a gradient
    """
    gradients = 0
    for layer in layers.values():
        held = layer.importance_of(name)
        for attribute, parameter in layer.adapter_tensors(name).items():
            gradient = parameter.grad
            gradients += gradient is not None
            own = torch.zeros_like(parameter) if gradient is None else (parameter * gradient).abs()
            mean, uncertainty = held[f"{attribute}.exp_avg_ipt"], held[f"{attribute}.exp_avg_unc"]
            mean.mul_(beta1).add_(own * (1 - beta1))
            uncertainty.mul_(beta2).add_((own - mean).abs() * (1 - beta2))
    if not gradients:
        raise ValueError(
            f"update_and_allocate: expected gradients of adapter {name!r}, got none; call it after optimizer.step() and before "
            "optimizer.zero_grad()"
        )


def forget_importance(layers: Layers, name: str) -> None:
    for layer in layers.values():
        layer.importance.pop(name, None)


@torch.no_grad()
def triple_importance(layer: AdaLoRALinear, name: str) -> torch.Tensor:
    """S [R]."""
    held = layer.importance_of(name)
    a, b, e = (held[f"lora_{key}.exp_avg_ipt"] * held[f"lora_{key}.exp_avg_unc"] for key in "ABE")
    return e.flatten() + (a.mean(dim=1) + b.mean(dim=0))


@torch.no_grad()
def allocate(layers: Layers, name: str, budget: int) -> RankPattern:
    """Set E of the least important triples to 0, so that at most `budget` are left; the pattern of those that are."""
    importance = [triple_importance(layer, name) for layer in layers.values()]
    device = importance[0].device
    scores = torch.cat([part.to(device) for part in importance])
    surplus = scores.numel() - budget
    kept = scores > scores.kthvalue(surplus).values if surplus > 0 else torch.ones_like(scores, dtype=torch.bool)
    sizes = [part.numel() for part in importance]
    _switch_off(layers, name, kept.split(sizes))
    rows = iter(kept.tolist())  # one copy from the device for all modules
    return {path: [next(rows) for _ in range(size)] for path, size in zip(layers, sizes, strict=True)}


@torch.no_grad()
def apply_pattern(layers: Layers, name: str, pattern: RankPattern) -> None:
    """Set E to 0 where the pattern says so; a module that it does not name keeps all."""
    sizes = [layer.lora_E[name].shape[0] for layer in layers.values()]
    kept = [pattern.get(path, [True] * size) for path, size in zip(layers, sizes, strict=True)]
    device = next(iter(layers.values())).lora_E[name].device
    flat = torch.tensor([value for values in kept for value in values], dtype=torch.bool).to(device)
    _switch_off(layers, name, flat.split(sizes))


def _switch_off(layers: Layers, name: str, kept: Iterable[torch.Tensor]) -> None:
    for layer, mask in zip(layers.values(), kept, strict=True):
        e = layer.lora_E[name]
        e.masked_fill_(~mask.to(e.device).view(-1, 1), 0.0)


def orthogonality(layers: Layers, name: str) -> torch.Tensor:
    """The penalty: mean over all A and B of the Frobenius distance of A A^T, or B^T B, from the identity. Outside autocast."""
    grams = []
    for layer in layers.values():
        a, b = layer.lora_A[name], layer.lora_B[name]
        with torch.autocast(a.device.type, enabled=False):
            grams += [a @ a.t(), b.t() @ b]
    device = grams[0].device
    distances = [
        torch.linalg.matrix_norm(gram - torch.eye(gram.shape[0], out=torch.empty_like(gram))) for gram in grams
    ]
    return torch.stack([distance.to(device) for distance in distances]).mean()
