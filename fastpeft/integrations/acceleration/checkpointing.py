"""What memory="memory" does to any model: every decoder layer keeps its input and is computed again in backward."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastpeft.integrations.acceleration.ledger import Acceleration


def computed_again() -> bool:
    """Whether non-reentrant checkpointing will compute, or now computes, again what runs here, and only as far as it must.

    It asks who takes what is kept for backward, so that the first pass and the second get one answer.
    """
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__module__


_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")


def checkpoint_layers(ledger: Acceleration, core: nn.Module) -> bool:
    """Turn gradient checkpointing on, non-reentrant, until restore; a user's own setting stays. True if it is on now.

    transformers' modules read two attributes of their own. They are set here instead of by gradient_checkpointing_enable,
    which also hooks the input embeddings: reentrant checkpointing needs that, and it would outlast its undoing.
    """
    modules = [module for module in core.modules() if hasattr(module, "gradient_checkpointing")]
    if any(module.gradient_checkpointing for module in modules):
        ledger.note("gradient checkpointing: on before, left as it was")
        return True
    if not modules or not core.supports_gradient_checkpointing:
        ledger.note(f"gradient checkpointing: {type(core).__name__} does not support it")
        return False
    refused = [name for name, config in _adapters(ledger.model).items() if not _works(config)]
    if refused:
        ledger.note(
            f"gradient checkpointing: off, adapter {refused[0]!r} keeps its keys in the cache that it switches off"
        )
        return False
    before = [
        (module, {name: module.__dict__[name] for name in _ATTRIBUTES if name in module.__dict__}) for module in modules
    ]

    def undo():
        for module, values in before:
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)
            module.__dict__.update(values)

    ledger.undo_by(undo)
    run = functools.partial(checkpoint, use_reentrant=False)
    for module in modules:
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = run
    ledger.note("gradient checkpointing: on for every layer, non-reentrant")
    return True


def _adapters(model: nn.Module) -> dict:
    """Adapters' configs by name, of fastpeft or of PEFT; {} for a bare model."""
    return getattr(model, "peft_config", {})


def _works(config) -> bool:
    """A config of PEFT's says nothing of it, and prefix tuning is its only method with trained keys in the cache."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    return getattr(config, "works_with_checkpointing", kind != "PREFIX_TUNING")
