"""accelerate(model): the training step of a transformers model, bare or with PEFT's or fastpeft's adapters, made fast in place.

    ledger.py     what was replaced, what was not and why, and how to undo all of it
    families.py   what the walk must be told of a model family: one row each
    apply.py      the walk, and the public accelerate and restore
    others        one file is one part of a step: what it replaces and when it falls back

A module is replaced by giving it another class, a subclass of its own: tensors, names, hooks, isinstance and state_dict stay.
"""

from fastpeft.integrations.acceleration.apply import accelerate, restore
from fastpeft.integrations.acceleration.ledger import Acceleration
from fastpeft.integrations.acceleration.peft_lora import accelerate_new_layers

__all__ = ["Acceleration", "accelerate", "accelerate_new_layers", "restore"]
