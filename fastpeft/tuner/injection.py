"""One adapter that is built beside a model and not installed yet."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.prompt import PromptLayer
from fastpeft.methods.config import PeftConfig


@dataclass
class Injection:
    """One adapter that is ready to be installed.

    layers: a new single-adapter wrapper per module; parameters: those of the base that are trained in place, by their path
    after the installation; prompt: of a prompt method
    """

    name: str
    config: PeftConfig
    layers: dict[str, AdapterLayer]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    prompt: PromptLayer | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their name on disk."""
        return disk_tensors(self.config, self.layers.items(), self.name, self.parameters, self.prompt)


def disk_tensors(
    config: PeftConfig,
    layers: Iterable[tuple[str, AdapterLayer]],
    name: str,
    parameters: dict[str, torch.Tensor],
    prompt: PromptLayer | None,
) -> dict[str, torch.Tensor]:
    """Tensors of adapter `name` in these (path, wrapper) pairs, of the base, and of the prompt, by their name on disk."""
    prefix = config.key_prefix
    tensors = {
        f"{prefix}{path}.{key}": tensor for path, layer in layers for key, tensor in layer.adapter_tensors(name).items()
    }
    tensors |= {prefix + path: parameter for path, parameter in parameters.items()}
    return tensors if prompt is None else tensors | prompt.disk_tensors()
