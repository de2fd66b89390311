"""A causal language model's output whose logits are computed when somebody asks for them.

`deferred(C)` is a subclass of transformers' own output class C. Its attribute `logits`, output["logits"], output.get("logits"),
an index or slice that reaches them, to_tuple() and pickling compute them, once. Keys, values, items, what walks over these
(pytrees, DistributedDataParallel, accelerate's conversion to float32) and copies do not: they meet a `DeferredLogits`.
"""

import contextlib
import copy
import functools
from collections.abc import Callable

import torch
from torch import nn


class DeferredLogits:
    """softcap tanh(head(hidden) / softcap), not computed yet.

    dtype: that of the logits. float(): the same, to be computed and then cast: accelerate asks for that in mixed precision.
    """

    def __init__(self, hidden: torch.Tensor, head: nn.Module, softcap: float | None):
        self.hidden, self.head, self.softcap = hidden, head, softcap
        device = hidden.device.type
        # a meta tensor's device has no autocast
        self._autocast = None
        if not hidden.is_meta and torch.is_autocast_enabled(device):
            self._autocast = torch.get_autocast_dtype(device)
        self.dtype = self._autocast or hidden.dtype
        self._version = self._weight_version()
        self._computed: torch.Tensor | None = None

    def _weight_version(self) -> int:
        weight = getattr(self.head, "weight", None)
        if weight is None or (not torch.compiler.is_compiling() and weight.is_inference()):
            return 0
        return weight._version

    def float(self) -> "DeferredLogits":
        other = copy.copy(self)
        other.dtype, other._computed = torch.float32, None
        return other

    def tensor(self) -> torch.Tensor:
        """The logits, with their graph where gradients are enabled.

        Raises:  RuntimeError where the head's weight has changed since the forward pass: these would be other logits
        """
        wants_graph = torch.is_grad_enabled() and (self.hidden.requires_grad or self.head.weight.requires_grad)
        if self._computed is None or (wants_graph and not self._computed.requires_grad):
            if self._weight_version() != self._version:
                raise RuntimeError(
                    "logits: expected to be asked for before the head's weight changes, got a weight of another version; read "
                    "output.logits before the optimiser's step, or accelerate without the part 'loss'"
                )
            self._computed = self._compute()
        return self._computed

    def _compute(self) -> torch.Tensor:
        autocast = contextlib.nullcontext()
        if not self.hidden.is_meta:
            enabled = self._autocast is not None
            autocast = torch.autocast(self.hidden.device.type, dtype=self._autocast, enabled=enabled)
        with autocast:
            logits = self.head(self.hidden)
            if self.softcap is not None:
                logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.to(self.dtype)

    def __deepcopy__(self, memo) -> "DeferredLogits":
        other = copy.copy(self)
        other.hidden, other._computed = copy.deepcopy(self.hidden, memo), None
        return other


def _value(raw):
    return raw.tensor() if isinstance(raw, DeferredLogits) else raw


@functools.cache
def deferred(own: type) -> type:
    """A subclass of the output class `own`, of the same name, whose logits may be a DeferredLogits."""

    def get_logits(self):
        return _value(self.__dict__.get("_logits"))

    def set_logits(self, logits):
        self.__dict__["_logits"] = logits

    def get_item(self, key):
        if isinstance(key, int):
            return self[list(self.keys())[key]]
        if isinstance(key, slice):
            return tuple(self[name] for name in list(self.keys())[key])
        key = self._replace_old_cache_name(key)
        return _value(dict(self.items())[key])

    def get(self, key, default=None):
        return _value(own.get(self, key, default))

    def copied(self, copier: Callable):
        return type(self)(**{name: copier(value) for name, value in self.items()})

    def reduce(self):
        return own, tuple(getattr(self, name) for name in own.__dataclass_fields__)

    names = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "logits": property(get_logits, set_logits),
        "__getitem__": get_item,
        "get": get,
        "__copy__": lambda self: copied(self, lambda value: value),
        "__deepcopy__": lambda self, memo: copied(self, lambda value: copy.deepcopy(value, memo)),
        "__reduce__": reduce,
    }
    return type(own)(own.__name__, (own,), names)
