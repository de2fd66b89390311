"""What a step holds beside the tensors that exist anyway: kept for backward, and at the peak."""

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.case import Work
from tests.saved_bytes import SavedBytes


class LivePeak(TorchDispatchMode):
    """Largest sum of storages that were made inside and alive at once; those in `known` do not count."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live or key in self._known:
            return
        self._live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def saved_bytes(work: Work) -> int:
    """Bytes that autograd keeps after the forward pass, beside what the work exempts."""
    gc.collect()
    with SavedBytes([*work.leaves, *work.exempt]) as watch:
        y = work.forward()
        kept = watch.total() + watch.beside()
    del y
    return kept


def peak_bytes(work: Work, dy: torch.Tensor | None, device: torch.device) -> int:
    """Bytes of new tensors alive at once during a step: the allocator's on a GPU, counted by PyTorch's operations on a CPU.

    Workspaces inside a CPU library's call are not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work.step(dy)
        return torch.cuda.max_memory_allocated(device) - before
    known = [*work.leaves, *work.exempt] + ([] if dy is None else [dy])
    with LivePeak(known) as watch:
        work.step(dy)
    return watch.peak
