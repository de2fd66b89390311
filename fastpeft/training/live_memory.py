"""Which bytes live when, and what they are: every storage that operators make, real or fake.

    with LiveMemory() as memory:
        memory.phase = "forward"; loss = step(); memory.keep_for_backward()
        memory.phase = "backward"; loss.backward(); memory.mark(gradients, "gradients")
    memory.peak()

A storage is born with the first operator that gives a tensor on it and dies with its last reference. Nothing is classified while
the step runs: what a storage was for is often known only later, so that is said afterwards, and the peak is read off the log.
The cost is linear in operators. What an operator allocates and frees inside itself is not seen.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ALLOCATION = 512
"""Bytes that PyTorch's CUDA allocator rounds every allocation up to."""

BASE, STATISTICS, ADAPTERS, GRADIENTS = "base weights", "quantisation statistics", "adapter weights", "gradients"
OPTIMIZER, LOGITS, BATCH = "optimizer state", "logits and loss", "batch"
SAVED, RECOMPUTED, WORKSPACE = "saved activations", "recomputed activations", "workspace"
KINDS = (BASE, STATISTICS, ADAPTERS, GRADIENTS, OPTIMIZER, SAVED, RECOMPUTED, LOGITS, WORKSPACE, BATCH)
"""What a storage of a training step is for, in the order of a table."""


@dataclass(slots=True, eq=False)
class Life:
    """One storage: its bytes, the numbers of the events at which it came and went, and what it was for, once that is known."""

    nbytes: int
    born: int
    phase: str
    operator: str
    recomputed: bool
    shape: tuple[int, ...]
    kind: str | None = None
    died: int | None = None

    def lives_at(self, event: int) -> bool:
        return self.born <= event and (self.died is None or self.died > event)


def _recomputes() -> bool:
    """Whether, in a backward pass, checkpointing runs a part of the forward pass again: it holds what that saves by hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@dataclass(frozen=True)
class Peak:
    """The most that lived at one time. parts: bytes by kind, which add up to nbytes; where: (phase, operator) that reached it."""

    nbytes: int
    parts: dict[str, int] = field(default_factory=dict)
    where: tuple[str, str] = ("", "")


class LiveMemory(TorchDispatchMode):
    """The log of all storages made inside, on any device; `add` enters those that were there before.

    round_to: bytes that an allocation is rounded up to, 1 for none
    """

    def __init__(self, round_to: int = ALLOCATION):
        super().__init__()
        self.round_to = round_to
        self.lives: list[Life] = []
        self.phase = "before"
        self._of: dict[int, Life] = {}
        self._references: dict[int, weakref.ref] = {}
        self._event = 0
        self._operator = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._operator = func
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return out

    def _see(self, tensor: torch.Tensor) -> Life:
        storage = tensor.untyped_storage()
        key = id(storage)
        life = self._of.get(key)
        if life is not None:
            return life
        self._event += 1
        nbytes = -(-storage.nbytes() // self.round_to) * self.round_to
        recomputed = self.phase == "backward" and _recomputes()
        life = Life(nbytes, self._event, self.phase, self._operator, recomputed, tuple(tensor.shape))
        self.lives.append(life)
        self._of[key] = life
        self._references[key] = weakref.ref(storage, functools.partial(self._gone, key))
        return life

    def _gone(self, key: int, _: weakref.ref) -> None:
        self._event += 1
        self._of.pop(key).died = self._event
        del self._references[key]

    # -- what a storage is for ------------------------------------------------------------------------------------------

    def mark(self, tensors: Iterable[torch.Tensor | None], kind: str) -> None:
        """Say what these tensors' storages are for; ones from before are entered."""
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor).kind = kind

    def mark_where(self, kind: str, holds) -> None:
        """Say what all storages are for of which `holds(life)` is true."""
        for life in self.lives:
            if holds(life):
                life.kind = kind

    def keep_for_backward(self) -> None:
        """The forward pass is over: what lives of it is kept for the backward pass."""
        for life in self._of.values():
            if life.kind is None and life.phase == "forward":
                life.kind = SAVED

    # -- results --------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> int:
        """The number of the last event."""
        return self._event

    def peak(self, after: int = 0, until: int | None = None) -> Peak:
        """The peak over all events, or those later than `after` and up to `until`."""
        until = self._event if until is None else until
        change = [0] * (self._event + 1)
        for life in self.lives:
            change[life.born] += life.nbytes
            if life.died is not None:
                change[life.died] -= life.nbytes
        most, at, current = -1, after, 0
        for event, by in enumerate(change[: until + 1]):
            current += by
            if event >= after and current > most:
                most, at = current, event
        parts: Counter[str] = Counter()
        where = ("", "")
        for life in self.lives:
            if life.lives_at(at):
                parts[life.kind or (RECOMPUTED if life.recomputed else WORKSPACE)] += life.nbytes
            if life.born == at:
                where = life.phase, str(life.operator)
        return Peak(max(most, 0), dict(parts), where)
