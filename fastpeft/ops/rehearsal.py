"""Running ops on fake tensors as if they were on a device: every allocation of their own code, no value and no launch."""

import contextlib
from collections.abc import Iterator

from fastpeft import backend
from fastpeft.ops.weights import own_scratch


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
