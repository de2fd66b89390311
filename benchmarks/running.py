"""Running a case: every provider's result compared, then its memory, then all of them timed in turn."""

import gc
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.case import ALLOWED_ERROR, Absent, Op, Work, described, largest_error
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.roofline import Roofline
from benchmarks.timing import ratio, times_of

Row = dict[str, Any]
COMPILED = "torch.compile"
"""Counting a CPU's live bytes makes it run eagerly, then and afterwards: its peak is not known there."""


def run_case(
    op: Op,
    case: Any,
    device: torch.device,
    roofline: Roofline,
    *,
    seconds: float,
    only: Sequence[str] | None = None,
    quick: bool = False,
    wall: bool = False,
) -> Row:
    """One row of the results: the case, its formulas, and what each provider did. A provider's failure is a row entry too."""
    names = [name for name in op.providers if (only is None or name in only) and not (quick and name in op.slow)]
    torch.manual_seed(0)
    found: dict[str, Row] = {}
    works = _built(op, case, device, names, found)
    inputs = op.inputs(case, device)
    y = _output(works)
    dy = output_gradient(y) if case.backward and y is not None else None
    _compare(op, case, device, works, found)
    for name in list(works):
        with _noted(found[name]) as failed:
            found[name]["saved_bytes"] = saved_bytes(works[name]) if dy is not None else 0
            if name != COMPILED or device.type == "cuda":
                found[name]["peak_bytes"] = peak_bytes(works[name], dy, device)
        if failed:
            del works[name]
    floor = roofline.floor(case)
    steps = {name: (lambda work=work: work.step(dy)) for name, work in works.items()}
    timed = times_of(steps, device, seconds, small=floor < 1e-4, wall=wall) if steps else {}
    for clock, times in timed.items():
        for name, its in times.items():
            found[name][f"{clock}_us"] = its.microseconds()
            if name != op.baseline and op.baseline in times and name != op.floor:
                found[name][f"{clock}_speedup"] = round(ratio(times[op.baseline], its), 3)
    main = "gpu_us" if device.type == "cuda" else "cpu_us"
    for name in works:
        found[name]["roofline_percent"] = round(100 * floor * 1e6 / found[name][main][1], 1)
    del works, steps, inputs
    gc.collect()
    return {
        "op": op.name,
        "case": str(case),
        "sizes": described(case),
        "flops": case.flops(),
        "bytes": case.bytes(),
        "floor_us": round(floor * 1e6, 2),
        "bound": roofline.bound(case),
        "baseline": op.baseline,
        "providers": found,
    }


class _noted:
    """Turns a provider's failure into its row's "failed"; the run goes on. Truthy if it failed."""

    def __init__(self, row: Row):
        self.row, self.failed = row, False

    def __enter__(self) -> "_noted":
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if isinstance(error, Absent):
            self.row["absent"] = str(error)
        elif isinstance(error, Exception):
            self.row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        else:
            return False
        self.failed = True
        return True

    def __bool__(self) -> bool:
        return self.failed


def _built(op: Op, case: Any, device: torch.device, names: Sequence[str], found: dict[str, Row]) -> dict[str, Work]:
    """Every provider over equal inputs, run once."""
    works = {}
    for name in names:
        found[name] = {}
        with _noted(found[name]) as failed, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work = op.providers[name](op.inputs(case, device))
            work.forward()
        if not failed:
            works[name] = work
    return works


def _output(works: dict[str, Work]) -> torch.Tensor | None:
    for work in works.values():
        return work.forward().detach()
    return None


def output_gradient(y: torch.Tensor) -> torch.Tensor:
    """The gradient of the output that every provider gets: ones for a loss, else normal."""
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.ones_like(y) if y.dim() == 0 else torch.empty_like(y).normal_(generator=generator)


def _compare(op: Op, case: Any, device: torch.device, works: dict[str, Work], found: dict[str, Row]) -> None:
    """error: against float64, on the case or, where that is random, on the one that is `alike`; correct: within the bound."""
    alike = op.alike(case)
    inputs = op.inputs(alike, device)
    exact, dy = None, None
    for name in list(works):
        if name == op.floor:
            continue
        with _noted(found[name]) as failed:
            work = works[name] if alike == case else op.providers[name](op.inputs(alike, device))
            if dy is None and case.backward:
                dy = output_gradient(work.forward().detach())
            if exact is None:
                exact = op.exact(inputs, dy)
            error = largest_error(work.step(dy), exact)
            found[name]["error"] = float(f"{error:.2e}")
            found[name]["correct"] = error <= ALLOWED_ERROR[case.dtype]
        if failed:
            del works[name]
