"""LoRA+: B learns faster than A.

    learning rate of A: lr, of B: ratio * lr;  and of LoRA on embeddings a rate of its own

Source:  Hayou et al. 2024, arXiv:2402.12354
"""

import math
from typing import Any

import torch
from torch import nn

from fastpeft.layers.lora_embedding import LoRAEmbedding


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer of what is trainable in `model`, in PEFT's four groups: A and the rest; embeddings; B; B without decay.

    B is every lora_B and every vector (biases, norms, DoRA's magnitudes); biases and the parameters of norms do not decay.
    kwargs: further arguments of optimizer_cls
    Raises:  ValueError for a rate or ratio that is not positive, or a model with nothing to train
    """
    for name, value in {
        "lr": lr,
        "loraplus_lr_ratio": loraplus_lr_ratio,
        "loraplus_lr_embedding": loraplus_lr_embedding,
    }.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
            raise ValueError(f"create_loraplus_optimizer: expected {name} above 0, got {value!r}")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("create_loraplus_optimizer: expected a model with trainable parameters, got none")
    kinds = {name: _kind(model, name, parameter) for name, parameter in trained.items()}
    decays = _decaying(model)
    groups = [
        ("a", True, lr),
        ("embedding", True, loraplus_lr_embedding),
        ("b", True, lr * loraplus_lr_ratio),
        ("b", False, lr * loraplus_lr_ratio),
    ]
    optimizer = optimizer_cls(
        [
            {
                "params": [
                    parameter
                    for name, parameter in trained.items()
                    if kinds[name] == kind and (kind != "b" or (name in decays) == decay)
                ],
                "weight_decay": loraplus_weight_decay if decay else 0.0,
                "lr": rate,
            }
            for kind, decay, rate in groups
        ],
        lr=lr,
        **kwargs,
    )
    if optimizer_cls.__name__ in ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"):
        from bitsandbytes.optim import GlobalOptimManager

        for module in model.modules():
            if isinstance(module, nn.Embedding):  # as transformers and PEFT do: their states stay in 32 bits
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _kind(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """ "embedding", "b" or "a" for a parameter's name such as ....q_proj.lora_B.default.weight."""
    owner = name.split(".")[:-2]  # a LoRA on an embedding holds its tensors in dictionaries by adapter name
    if owner and isinstance(model.get_submodule(".".join(owner)), LoRAEmbedding):
        return "embedding"
    return "b" if "lora_B" in name or parameter.ndim == 1 else "a"


def _decaying(model: nn.Module) -> set[str]:
    """Names of parameters that are no biases and in no norm, as transformers' Trainer counts them."""
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
    from transformers.trainer_pt_utils import get_parameter_names

    return {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
