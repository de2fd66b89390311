"""Counts the bytes that autograd keeps for the backward pass, beside parameters and buffers.

with SavedBytes(module) as saved:
    loss = module(x).sum()
assert saved.total() == ...
"""

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastpeft.ops.dropout import BESIDE, Keep


@dataclass(frozen=True)
class SavedStorage:
    """One storage that autograd holds: its size in bytes, and shape and dtype of the first tensor seen in it."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Holder:
    """What autograd keeps in a saved tensor's place; it dies with the graph node that owns it."""

    __slots__ = ("__weakref__", "beside", "tensor")

    def __init__(self, tensor: torch.Tensor, beside: Keep | None):
        self.tensor, self.beside = tensor, beside


class SavedBytes:
    """Watches every tensor saved for backward while the context is open.

    Counted once per storage, with the whole storage's size: a view of a big tensor keeps all of it. Storages of the given
    module's parameters and buffers, or of the given tensors, are left out, since they exist anyway. Tensors that an
    autograd.Function keeps as attributes of `ctx` escape; use `ctx.save_for_backward`.
    """

    def __init__(self, exempt: torch.nn.Module | Iterable[torch.Tensor] = ()):
        if isinstance(exempt, torch.nn.Module):
            exempt = [*exempt.parameters(), *exempt.buffers()]
        self._exempt = {tensor.untyped_storage().data_ptr() for tensor in exempt}
        self._holders: list[weakref.ref[_Holder]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)

    def _pack(self, tensor: torch.Tensor) -> _Holder:
        alone = tensor.detach()  # with its graph it would hold the node that holds it
        holder = _Holder(alone, getattr(tensor, BESIDE, None))
        self._holders.append(weakref.ref(holder))
        return holder

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def storages(self) -> list[SavedStorage]:
        """The storages that are alive now, largest first: none after a backward pass that frees its graph."""
        gc.collect()
        alive: dict[int, SavedStorage] = {}
        for reference in self._holders:
            holder = reference()
            if holder is None:
                continue
            storage = holder.tensor.untyped_storage()
            if storage.data_ptr() not in self._exempt:
                row = SavedStorage(storage.nbytes(), tuple(holder.tensor.shape), holder.tensor.dtype)
                alive.setdefault(storage.data_ptr(), row)
        return sorted(alive.values(), key=lambda row: -row.nbytes)

    def beside(self) -> int:
        """Bytes of the dropout masks that are alive beside saved tensors."""
        gc.collect()
        holders = filter(None, (reference() for reference in self._holders))
        return sum(holder.beside.nbytes for holder in holders if holder.beside is not None)

    def total(self) -> int:
        """Bytes alive now."""
        return sum(row.nbytes for row in self.storages())
