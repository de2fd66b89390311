"""PiSSA, OLoRA and LoftQ as plain LoRA of twice the rank, on the base's own weights.

W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0],    A0, B0 the values at the start of the training
"""

import dataclasses
import math
import os

import torch

from fastpeft.checkpoint import compare, read_tensors
from fastpeft.layers.lora_init import changes_base
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.lora import LoraConfig
from fastpeft.tuner import Tuner


@torch.no_grad()
def as_plain_lora(
    tuner: Tuner, name: str, config: PeftConfig, tensors: dict[str, torch.Tensor], initial: str | os.PathLike | None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """(config, tensors on disk) of the adapter `name` as plain LoRA.

    initial: a folder with A0 and B0, saved before the training; None computes them again from the base's own weights
    LoftQ's base is quantised beyond W - s B0 A0: its plain form is on the full weights, without that loss.
    Raises:  ValueError for an adapter that is not LoRA, has DoRA's magnitudes, or starts at the base's own weights, and for a
             folder that is not of this adapter
    """
    where = "save_pretrained: path_initial_model_for_weight_conversion"
    if type(config) is not LoraConfig or config.use_dora:
        raise ValueError(f"{where}: expected LoRA without DoRA, got {name!r}, which is {config.peft_type}")
    if initial is None and not changes_base(config.init_lora_weights):
        raise ValueError(
            f"{where}: expected an adapter that starts from changed base weights, got {name!r} with init_lora_weights="
            f"{config.init_lora_weights!r}, which is plain LoRA already"
        )
    if initial is None:
        before = config.to_disk(tuner.prepare(_unused(tuner), config, strict=False).tensors())
    else:
        before = read_tensors(initial)
    compare(tensors, before)
    doubled = {}
    for key, tensor in tensors.items():
        start = before[key].to(tensor)
        if ".lora_A." in key or key.endswith(".lora_embedding_A"):
            doubled[key] = torch.cat([tensor, start], dim=0)
        elif key.endswith((".lora_B.weight", ".lora_embedding_B")):
            doubled[key] = torch.cat([tensor, -start], dim=1)
        else:
            doubled[key] = tensor
    growth = math.sqrt(2) if config.use_rslora else 2
    plain = dataclasses.replace(
        config,
        init_lora_weights=True,
        loftq_config={},
        r=2 * config.r,
        lora_alpha=growth * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: growth * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return plain, doubled


def _unused(tuner: Tuner) -> str:
    return "_" + "_".join(tuner.peft_config)
