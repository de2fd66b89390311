"""What was replaced in a model, what was not and why, and how to undo it.

A replaced module's class becomes a subclass of (replacement, its own class) of the same name. Where the replacement cannot do
what is asked of it in a call, it runs the module's own forward and says why to its `Slot`.
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from fastpeft.ops.fast_matmul import fast_float32_matmul, float32_path

SLOT = "_fastpeft_slot"
LEDGER = "_fastpeft_acceleration"


class Slot:
    """A replaced module's line in the ledger. fallbacks: how often it ran its own forward, by reason."""

    def __init__(self, path: str, part: str, kind: str, module: nn.Module):
        self.path, self.part, self.kind = path, part, kind
        self.fallbacks: Counter[str] = Counter()
        self._module = weakref.ref(module)

    def covered_by(self) -> str | None:
        """Where the code is from that has since put another forward on the module; None where ours is what is called."""
        module = self._module()
        forward = None if module is None else module.__dict__.get("forward")
        if forward is None:
            return None
        function = getattr(forward, "__func__", forward)
        return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


class Kept(NamedTuple):
    """A module that stays as it was."""

    path: str
    part: str
    kind: str
    why: str


class Accelerated:
    """Mixin of every replacement: a subclass defines forward, which may call `self.fall_back(why, ...)`.

    added: names of the attributes that the replacement keeps on the module; they leave with it.
    A copy or a pickle of a replaced module is one of its own class, as before the replacement.
    """

    added: ClassVar[tuple[str, ...]] = ()
    _own_class: type[nn.Module]

    def forward(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__}: a replacement defines forward")

    def fall_back(self, why: str, *args, **kwargs):
        """The module's own forward; `why` is counted."""
        slot = self.__dict__.get(SLOT)
        if slot is not None:
            slot.fallbacks[why] += 1
        return self.as_before(*args, **kwargs)

    def as_before(self, *args, **kwargs):
        """The module's own forward, uncounted."""
        return self._own_class.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        ours = (SLOT, LEDGER, *self.added)
        state = {name: value for name, value in self.__dict__.items() if name not in ours}
        return _instance, (self._own_class,), state


def _instance(own: type) -> nn.Module:
    return own.__new__(own)


def _nothing() -> None:
    return None


@functools.cache
def _subclass(replacement: type, own: type) -> type:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "_own_class": own}
    return type(own.__name__, (replacement, own), names)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has when nothing is accelerated."""
    return module._own_class if isinstance(module, Accelerated) else type(module)


class Acceleration:
    """The ledger of one accelerated model, which `fastpeft.accelerate` returns.

    slots: replaced modules; kept: those that stayed, with the reason; notes: what else was set, one line each
    look_again: called before a summary, to find what was added to the model since
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.slots: list[Slot] = []
        self.kept: list[Kept] = []
        self.notes: list[str] = []
        self._float32_products = ""
        self._undo: list[Callable[[], None]] = []
        self.look_again: Callable[[], None] = _nothing

    # -- for the parts ------------------------------------------------------------------------------------------------

    def swap(self, path: str, module: nn.Module, replacement: type[Accelerated], part: str, **settings: Any) -> bool:
        """Let `module` run `replacement`'s forward, with `settings` as attributes, all of them named in `added`.

        False, with the reason kept, where somebody else has replaced it.
        """
        kind = own_class(module).__name__
        if isinstance(module, Accelerated):
            return False  # reached by two paths
        if "forward" in module.__dict__:
            self.keep(path, module, part, "its forward was replaced on the instance by other code")
            return False
        own = type(module)
        slot = Slot(path, part, kind, module)
        module.__class__ = _subclass(replacement, own)
        module.__dict__.update(settings)
        module.__dict__[SLOT] = slot
        self.slots.append(slot)

        def undo():
            module.__class__ = own
            for name in (SLOT, *replacement.added):
                module.__dict__.pop(name, None)

        self._undo.append(undo)
        return True

    def keep(self, path: str, module: nn.Module, part: str, why: str) -> None:
        """Record that `module` stays as it was."""
        self.kept.append(Kept(path, part, own_class(module).__name__, why))

    def note(self, line: str) -> None:
        self.notes.append(line)

    def undo_by(self, undo: Callable[[], None]) -> None:
        """Call `undo` at restore; the last change is undone first."""
        self._undo.append(undo)

    # -- for users ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fast_matmul(self) -> Iterator[bool]:
        """Send float32 products on a CPU to oneDNN while inside, where they stay float32; yields whether they go there.

        Around training steps, or around a trainer's train(). PyTorch has one such setting for all code, so it is never left on.
        """
        device = self._device()
        path = float32_path(device)
        self._float32_products = (
            f"oneDNN inside fast_matmul(), {path.why}" if path.allowed else f"PyTorch's own, {path.why}"
        )
        with fast_float32_matmul(device) as on:
            yield on

    def float32_products(self) -> str:
        """How this model's float32 products were taken; "" on a GPU, which this does not concern."""
        if self._device().type != "cpu":
            return ""
        return self._float32_products or "PyTorch's own; fast_matmul() was not entered"

    @property
    def fallbacks(self) -> Counter[tuple[str, str]]:
        """How often replaced modules ran their own forward, by (part, reason), since the model was accelerated."""
        total: Counter[tuple[str, str]] = Counter()
        for slot in self.slots:
            for why, count in slot.fallbacks.items():
                total[slot.part, why] += count
        return total

    def summary(self) -> str:
        """What was replaced, what was not and why, and which calls fell back so far."""
        self.look_again()
        lines = []
        replaced = Counter((slot.part, slot.kind) for slot in self.slots)
        kept = Counter((item.part, item.kind, item.why) for item in self.kept)
        totals = Counter(replaced)
        for (part, kind, _), count in kept.items():
            totals[part, kind] += count
        for (part, kind), total in sorted(totals.items()):
            lines.append(f"{part:10} {kind:28} {replaced[part, kind]} of {total} replaced")
            lines += [
                f"{'':10}   {count} kept: {why}"
                for (of, its, why), count in sorted(kept.items())
                if (of, its) == (part, kind)
            ]
        covered = Counter((slot.part, slot.kind, slot.covered_by()) for slot in self.slots)
        lines += [
            f"{part:10} {count} {kind}: {by} has put another forward on it since; ours acts only where that one calls it"
            for (part, kind, by), count in sorted(covered.items(), key=str)
            if by is not None
        ]
        lines = lines or ["nothing in this model is replaced"]
        lines += self.notes
        if self.float32_products():
            lines.append(f"float32 products: {self.float32_products()}")
        for (part, why), count in sorted(self.fallbacks.items()):
            lines.append(f"{part:10} {count} calls ran the model's own code: {why}")
        return "\n".join(lines)

    def report(self) -> None:
        """Print `summary()`."""
        print(self.summary())

    def __reduce__(self):
        return _nothing, ()  # a copy of the model is not accelerated

    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def restore(self) -> None:
        """Give every module its own class back and undo what else was set; the last change first."""
        self.look_again = _nothing
        while self._undo:
            self._undo.pop()()
        self.model.__dict__.pop(LEDGER, None)
