"""Running ops on fake tensors as if they were on a device: every allocation of their own code, no value and no launch."""

import contextlib
from collections.abc import Iterator

from fastpeft import backend
from fastpeft.ops.weights import own_scratch


def spans(m: int, rows: int) -> Iterator[slice]:
    """0..m in parts of `rows`. In a rehearsal the first, the second and the last: the others allocate what the second does."""
    firsts = range(0, m, max(1, rows))
    if backend.rehearsing() and len(firsts) > 3:
        firsts = firsts[0], firsts[1], firsts[-1]
    return (slice(first, min(m, first + rows)) for first in firsts)


@contextlib.contextmanager
def rehearsal(device_type: str, facts: backend.GpuFacts | None = None) -> Iterator[None]:
    """backend.rehearsal with launchers that launch nothing, and a scratch buffer that goes with it.

    device_type: "cuda", for the implementations and tiles of the GPU that `facts` describes, or "cpu". Where Triton is missing
    the library calls are rehearsed for both, as they would run.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_scratch())  # a buffer of fake bytes must not outlast this
        stack.enter_context(backend.rehearsal(device_type, facts))
        if facts is not None and backend.triton_installed():
            from fastpeft.kernels.launch import rehearse_launches
            from fastpeft.kernels.tiling import Target

            stack.enter_context(rehearse_launches(Target(facts.arch, facts.processors)))
        yield
