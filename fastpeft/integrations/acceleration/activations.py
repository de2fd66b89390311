"""Which activation a module or function is, by its class or itself: one of reference/glu.py's names, or None."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

# classes of transformers.activations. NewGELU, FastGELU and AccurateGELU write out the tanh approximation
_BY_CLASS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
}


def activation_of(act: nn.Module | Callable) -> str | None:
    """ "silu", "gelu" (erf) or "gelu_tanh"; None for one that is not known."""
    if isinstance(act, nn.SiLU):
        return "silu"
    if isinstance(act, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if act in (F.silu, F.gelu):
        return "silu" if act is F.silu else "gelu"
    kind = type(act)
    return _BY_CLASS.get(kind.__name__) if kind.__module__ == "transformers.activations" else None
