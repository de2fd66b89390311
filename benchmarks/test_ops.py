"""The same cases through pytest-benchmark: groups, saved files, comparison.

    pytest benchmarks --benchmark-only [--benchmark-autosave] [--benchmark-compare] [--benchmark-group-by=group]
    pytest benchmarks --benchmark-only -k "lora and M1024"

A provider whose result is not that of float64 fails instead of being timed; one that cannot run here is skipped, and says why.
Run by itself: the project's test command leaves this folder out. --all-cases takes every case in place of the quick ones.
"""

import pytest
import torch

from benchmarks.case import ALLOWED_ERROR, Absent, largest_error
from benchmarks.ops import ops
from benchmarks.running import output_gradient
from benchmarks.timing import keep_freed_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(every: bool) -> list:
    """(op, case, provider) of all that is measured."""
    return [
        pytest.param(op, case, name, id=f"{op.name}/{case}/{name}")
        for op in ops().values()
        for case in op.of(None, not every)
        for name in op.providers
        if name not in op.slow or every
    ]


def test_step(op, case, provider, benchmark):
    torch.set_num_threads(1)
    keep_freed_memory()
    benchmark.group = f"{op.name}/{case}"
    benchmark.extra_info.update({"flops": case.flops(), "bytes": case.bytes()})
    try:
        work = op.providers[provider](op.inputs(case, DEVICE))
        dy = output_gradient(work.forward().detach()) if case.backward else None
        if provider != op.floor:
            alike = op.inputs(op.alike(case), DEVICE)
            checked = op.providers[provider](alike)
            error = largest_error(checked.step(dy), op.exact(alike, dy))
            assert error <= ALLOWED_ERROR[case.dtype], (
                f"{provider}: error {error:.2e} > {ALLOWED_ERROR[case.dtype]:.0e}"
            )
    except Absent as reason:
        pytest.skip(str(reason))

    def step():
        work.step(dy)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
