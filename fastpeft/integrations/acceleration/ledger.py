"""What was replaced in a model, what was not and why, and how to undo it.

A replaced module's class becomes a subclass of (replacement, its own class) of the same name. Where the replacement cannot do
what is asked of it in a call, it runs the module's own forward and says why to its `Slot`.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import nn

SLOT = "_fastpeft_slot"
LEDGER = "_fastpeft_acceleration"


class Slot:
    """A replaced module's line in the ledger. fallbacks: how often it ran its own forward, by reason."""

    def __init__(self, path: str, part: str, kind: str):
        self.path, self.part, self.kind = path, part, kind
        self.fallbacks: Counter[str] = Counter()


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
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.slots: list[Slot] = []
        self.kept: list[Kept] = []
        self.notes: list[str] = []
        self._undo: list[Callable[[], None]] = []

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
        slot = Slot(path, part, kind)
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
        lines += self.notes
        for (part, why), count in sorted(self.fallbacks.items()):
            lines.append(f"{part:10} {count} calls ran the model's own code: {why}")
        return "\n".join(lines) or "nothing in this model is replaced"

    def report(self) -> None:
        """Print `summary()`."""
        print(self.summary())

    def __reduce__(self):
        return _nothing, ()  # a copy of the model is not accelerated

    def restore(self) -> None:
        """Give every module its own class back and undo what else was set; the last change first."""
        while self._undo:
            self._undo.pop()()
        self.model.__dict__.pop(LEDGER, None)
