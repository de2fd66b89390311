"""How a part gets at a linear's tensors, to compute several linears of a model in one op.

    shared_call(x)      fastpeft's LoRALinear, and PEFT's LoRA layers once they are accelerated: adapters as they act now
    frozen nn.Linear    its weight and bias; bitsandbytes' Linear4bit too, and transformers' Conv1D

None is the answer wherever the linear's own forward does more than that: a hook, another class, a weight that trains.
"""

from collections.abc import Sequence

import torch
from torch import nn

from fastpeft.integrations.acceleration.ledger import Acceleration
from fastpeft.layers.base_weight import (
    READING,
    compute_dtype,
    frozen_weight,
    is_linear_4bit,
    is_linear_8bit,
    is_linear_base,
    is_repacked,
)
from fastpeft.layers.linear_adapter import is_plain_linear, is_untouched
from fastpeft.layers.shared_input import Call
from fastpeft.ops.lora_group import Projection

_CPU_PACKING = "support_avx512bf16_for_cpu"  # bitsandbytes' switch for repacking 4-bit weights


def undo_reading(ledger: Acceleration, linear: nn.Module) -> None:
    """At restore a quantised linear loses what reading its weight leaves on it: the reading, the switch against repacking.

    Call it before the first reading.
    """
    before = {name: linear.__dict__[name] for name in (READING, _CPU_PACKING) if name in linear.__dict__}

    def undo():
        for name in (READING, _CPU_PACKING):
            linear.__dict__.pop(name, None)
        linear.__dict__.update(before)

    ledger.undo_by(undo)


def call_of(module: nn.Module, x: torch.Tensor) -> Call | None:
    """All that one op needs to compute `module` for x; None where that is not all that the module does."""
    if not is_untouched(module) or getattr(module, "row_adapters", None) is not None:
        return None
    shared_call = getattr(module, "shared_call", None)
    if shared_call is not None:
        return shared_call(x)
    if not is_linear_base(module) or not is_plain_linear(module):
        return None
    if is_linear_8bit(module):  # bitsandbytes may round x to int8
        return None
    if is_linear_4bit(module):
        if is_repacked(module) or compute_dtype(module, x.dtype) != x.dtype:
            return None
    elif module.weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    return Call(Projection(frozen_weight(module), bias=module.bias), "auto", False)


def options_of(calls: Sequence[Call], impl: str) -> tuple[str, bool] | None:
    """(impl, exact) under which one op may compute all of `calls`, None where they disagree.

    A linear without an adapter goes along with any; `impl` is for where none has one.
    """
    wanted = {(call.impl, call.exact) for call in calls if call.projection.a is not None}
    if len(wanted) > 1:
        return None
    return wanted.pop() if wanted else (impl, False)
