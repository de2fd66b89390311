"""Launching a kernel on the device of its tensors, or only writing down what would be launched.

Under `record_launches(target)` the launchers run on meta tensors: they choose tiles for `target` and append a `Launch`
per kernel instead of running it. Ahead-of-time compilation takes its cases from there, so what is compiled and measured
is what the launchers launch, argument for argument.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton

from fastpeft.kernels.tiling import GENERIC, INTERPRETER, Target, TileConfig


@dataclass(frozen=True)
class Launch:
    """One kernel launch: positional arguments in the kernel's order, then its constexprs by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constexprs: dict[str, Any]
    config: TileConfig


@dataclass(frozen=True)
class _Recording:
    target: Target
    launches: list[Launch] | None


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


def target_of(device: torch.device) -> Target:
    """The target that launchers choose tiles for when their tensors live on `device`."""
    recording = _recording.get()
    if recording is not None:
        return recording.target
    return _device_target(device.type, device.index)


@functools.cache
def _device_target(device_type: str, index: int | None) -> Target:
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    if device_type != "cuda":
        return GENERIC
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        arch = f"sm_{properties.major}{properties.minor}"
    else:
        arch = properties.gcnArchName.split(":")[0]
    return Target(arch, properties.multi_processor_count)


def launch(kernel, grid: tuple[int, ...], config: TileConfig, *args, **constexprs) -> None:
    """kernel[grid](*args, **constexprs) with the warps and stages of `config`, on the device of the first argument.

    That is a tensor, or the descriptor of one.
    """
    recording = _recording.get()
    if recording is not None:
        if recording.launches is None:
            return
        recording.launches.append(Launch(kernel, grid, args, constexprs, config))
        return
    with _device_of(getattr(args[0], "base", args[0])):
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **config.options}
        kernel[grid](*args, **constexprs, **options)


def _device_of(tensor: torch.Tensor):
    """Triton launches on the current device: make that the tensor's, if it is not."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@contextlib.contextmanager
def record_launches(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of running them; give the launchers tensors on device "meta"."""
    launches: list[Launch] = []
    token = _recording.set(_Recording(target, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


@contextlib.contextmanager
def rehearse_launches(target: Target) -> Iterator[None]:
    """Launch nothing inside the block and keep nothing: the launchers allocate, on whatever tensors they are given."""
    token = _recording.set(_Recording(target, None))
    try:
        yield
    finally:
        _recording.reset(token)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] itself if its last axis is contiguous (rows may have any stride), else a contiguous copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def dot_precision(precision: str, dtype: torch.dtype, target: Target) -> str:
    """The `input_precision` of tl.dot: `precision` for float32 where the target has tf32, else "ieee", which is exact."""
    arch = target.arch
    has_tf32 = arch in ("interpreter", "gfx942") or (arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 80)
    return precision if dtype == torch.float32 and has_tf32 else "ieee"
