"""What a benchmark is made of: cases as data, providers that compute a case, and the answer in float64.

A case holds sizes and says its FLOP and its compulsory bytes as formulas. All providers of a case get equal tensors and equal
output gradients. A provider that cannot run here raises `Absent` and is named as absent; one that fails is named as failed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

ALLOWED_ERROR = {"float32": 5e-6, "bfloat16": 2e-2, "float16": 3e-3}
"""Largest relative error (Frobenius norm, of y and of every gradient, against float64) with which a provider counts as right:
2.5 roundings of a 16-bit dtype, or 40 of float32, whose sums are long."""


class Absent(Exception):
    """A provider that cannot run here, with the reason."""


class Case(Protocol):
    """Sizes of one measurement: a frozen dataclass with these."""

    dtype: str
    backward: bool

    def __str__(self) -> str: ...
    def flops(self) -> float: ...
    def bytes(self) -> float: ...


@dataclass(frozen=True)
class Work:
    """What a provider does for a case. leaves: the tensors whose gradients are compared, in the order of the op's `exact`."""

    forward: Callable[[], torch.Tensor]
    leaves: Sequence[torch.Tensor] = ()
    exempt: Sequence[torch.Tensor] = ()
    """Tensors that exist anyway: weights, and inputs that their producers hold. They do not count as kept."""

    def step(self, dy: torch.Tensor | None) -> list[torch.Tensor]:
        """Forward, and backward from dy if it is given; [y, gradients of the leaves]."""
        y = self.forward()
        if dy is None:
            return [y]
        return [y, *torch.autograd.grad(y, self.leaves, dy)]


@dataclass(frozen=True)
class Op:
    """One op: its cases, how its inputs are drawn, who computes it, and the answer.

    baseline: the provider over which speed-ups are told; floor: one that does less and so says what is left to win, or ""
    exact(inputs, dy): y and the gradients of a Work's leaves in float64
    alike: the case whose results are compared, where the case itself is random (dropout)
    """

    name: str
    title: str
    cases: Sequence[Any]
    quick: Sequence[Any]
    baseline: str
    inputs: Callable[[Any, torch.device], Any]
    providers: dict[str, Callable[[Any], Work]]
    exact: Callable[[Any, torch.Tensor | None], list[torch.Tensor]]
    floor: str = ""
    alike: Callable[[Any], Any] = lambda case: case
    slow: frozenset[str] = frozenset({"torch.compile"})
    """Providers that --quick leaves out, and that a run without --all takes for the quick cases only."""

    def of(self, names: Sequence[str] | None, quick: bool) -> Iterator[Any]:
        """The quick cases alone, or those and all others; only those whose op/name holds one of `names`."""
        for case in self.quick if quick else dict.fromkeys((*self.quick, *self.cases)):
            if names is None or any(name in f"{self.name}/{case}" for name in names):
                yield case


def described(case: Any) -> dict[str, Any]:
    """A case's fields, for the file."""
    return asdict(case)


def largest_error(got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest relative error in Frobenius norm over y and the gradients."""
    errors = []
    for one, true in zip(got, exact, strict=True):
        size = true.norm().item()
        errors.append((one.detach().double() - true).norm().item() / (size or 1.0))
    return max(errors)
