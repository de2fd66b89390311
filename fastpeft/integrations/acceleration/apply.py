"""fastpeft.accelerate and fastpeft.restore: one walk over a model, in which every part replaces what it knows."""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from fastpeft.integrations.acceleration.attention import replace_attention
from fastpeft.integrations.acceleration.checkpointing import checkpoint_layers
from fastpeft.integrations.acceleration.families import FAMILIES, Family
from fastpeft.integrations.acceleration.ledger import LEDGER, Acceleration
from fastpeft.integrations.acceleration.loss import replace_loss
from fastpeft.integrations.acceleration.mlp import replace_mlp
from fastpeft.integrations.acceleration.norm import replace_norms
from fastpeft.integrations.acceleration.offload import offload_activations
from fastpeft.integrations.acceleration.peft_lora import replace_lora
from fastpeft.integrations.acceleration.rope import replace_rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY = ("speed", "balanced", "memory")


@dataclass(frozen=True)
class Walk:
    """What every part gets.

    model: what the user passed; core: the transformers model in it; family: its row; ledger: where to record
    memory: "speed" keeps what backward needs, "balanced" computes elementwise results again, "memory" also products
    impl, exact: implementation of the ops, and whether what adapters hold in a wider dtype is multiplied in it
    """

    model: nn.Module
    core: "PreTrainedModel"
    family: Family
    ledger: Acceleration
    memory: str
    impl: str
    exact: bool


PARTS: dict[str, Callable[[Walk], None]] = {
    "lora": replace_lora,
    "attention": replace_attention,
    "rope": replace_rope,
    "norm": replace_norms,
    "mlp": replace_mlp,
    "loss": replace_loss,
}
"""Every part by name, in the order in which they are applied."""


def accelerate(
    model: nn.Module,
    *,
    parts: Collection[str] | None = None,
    memory: str = "balanced",
    offload: bool = False,
    impl: str = "auto",
    exact: bool = False,
) -> Acceleration:
    """Make the training step of a transformers model fast and small in place, without changing what it computes.

    model: bare, or wrapped by PEFT (get_peft_model, TRL, model.add_adapter) or by fastpeft
    parts: names of PARTS; None for all
    memory: "speed" keeps what backward needs, "balanced" computes elementwise results again; "memory" also products, and turns
    gradient checkpointing of the layers on where the model has it
    offload: hold what is kept for backward in CPU memory, where the model is on a GPU
    exact: take low-rank products in the adapters' own float32 over a bfloat16 model; else they are rounded to bfloat16
    Returns the ledger: its report() prints what was replaced, what was not, and why.
    A model that is accelerated already is restored first, so that a call after new adapters finds them too.
    Raises:  TypeError for a model that holds no transformers model; ValueError for an unknown part or memory policy
    """
    from transformers import PreTrainedModel

    core = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if core is None:
        raise TypeError(f"accelerate: expected a transformers model, bare or wrapped, got {type(model).__name__}")
    chosen = list(PARTS) if parts is None else list(parts)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise ValueError(f"accelerate: expected parts of {tuple(PARTS)}, got {unknown}")
    if memory not in MEMORY:
        raise ValueError(f"accelerate: expected memory in {MEMORY}, got {memory!r}")
    restore(model)
    ledger = Acceleration(model)
    family = FAMILIES.get(core.config.model_type, Family(rotary=None, decoder=None))
    model.__dict__[LEDGER] = ledger
    with contextlib.ExitStack() as undo:
        undo.callback(ledger.restore)
        if memory == "memory" and checkpoint_layers(ledger, core):
            memory = "balanced"  # within a layer: what is computed again there is not computed a third time
        walk = Walk(model, core, family, ledger, memory, impl, exact)
        for name, apply in PARTS.items():
            if name in chosen:
                apply(walk)
        if offload:
            offload_activations(ledger, core)
        undo.pop_all()  # nothing failed
    return ledger


def restore(model: nn.Module) -> None:
    """Undo accelerate: classes, functions and settings are what they were. A model that is not accelerated stays as it is."""
    for module in list(model.modules()):
        ledger = module.__dict__.get(LEDGER)
        if ledger is not None:
            ledger.restore()
