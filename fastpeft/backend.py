"""Which implementation of an op runs here, and the only reader of fastpeft's environment variables.

| name | where it runs | when `auto` chooses it |
|---|---|---|
| torch | any device | tensors on a CPU, or where triton is not installed |
| triton | CUDA, ROCm, XPU; the CPU in Triton's interpreter | tensors on a GPU |
| reference | anywhere | never |

Environment: FASTPEFT_IMPL replaces what `auto` means; TRITON_INTERPRET=1 (Triton's own variable) makes `triton` legal on
the CPU, for tests; FASTPEFT_TUNE_DIR is where `fastpeft tune` keeps what it measured.
"""

import contextlib
import functools
import importlib.util
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

IMPLEMENTATIONS = ("torch", "triton", "reference")
GPU_DEVICE_TYPES = ("cuda", "xpu")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Rehearsal(threading.local):
    device_type: str | None = None
    facts: "GpuFacts | None" = None


_rehearsal = _Rehearsal()


@contextlib.contextmanager
def rehearsal(device_type: str, facts: "GpuFacts | None" = None) -> Iterator[None]:
    """Inside, in this thread, fake CPU tensors stand for tensors of a `device_type`, of which gpu_facts says `facts`.

    Ops choose what they would choose there and run their own code, with every allocation that it makes; no value is read.
    Kernels have to be kept from launching: fastpeft.kernels.launch.rehearse_launches.
    """
    before = _rehearsal.device_type, _rehearsal.facts
    _rehearsal.device_type, _rehearsal.facts = device_type, facts
    try:
        yield
    finally:
        _rehearsal.device_type, _rehearsal.facts = before


def rehearsing() -> bool:
    """True inside `rehearsal`."""
    return _rehearsal.device_type is not None


def type_of(device: torch.device) -> str:
    """device.type, or in a rehearsal that of the device that it stands for."""
    return _rehearsal.device_type or device.type


@functools.cache
def triton_installed() -> bool:
    """True if the triton package can be found; nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """True if Triton kernels run in its CPU interpreter in this process (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that `impl` means for tensors of `dtype` on `device`: "torch", "triton" or "reference".

    Only "auto" chooses. A named implementation is used or refused, never replaced.
    Raises:  ValueError for an unknown name, NotImplementedError where the named one cannot run, naming what is missing
    """
    if impl == "auto":
        impl = os.environ.get("FASTPEFT_IMPL", "auto")
    if impl == "auto":
        on_gpu = type_of(device) in GPU_DEVICE_TYPES and triton_installed() and dtype in KERNEL_DTYPES
        return "triton" if on_gpu else "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected 'auto' or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "triton":
        if not triton_installed():
            raise NotImplementedError("impl='triton': triton is not installed; pip install triton, or use impl='torch'")
        if type_of(device) not in GPU_DEVICE_TYPES and not triton_interpreted():
            raise NotImplementedError(
                f"impl='triton': expected tensors on one of {GPU_DEVICE_TYPES}, got {device.type}; "
                "use impl='torch', or set TRITON_INTERPRET=1 before the start to interpret the kernels (tests only)"
            )
        if dtype not in KERNEL_DTYPES:
            raise NotImplementedError(
                f"impl='triton': expected one of {KERNEL_DTYPES}, got {dtype}: the kernels sum in float32; use impl='torch'"
            )
    return impl


def matmul_precision(device: torch.device) -> str:
    """How float32 products are taken in a Triton kernel, "ieee" or "tf32": what PyTorch's own matmul would do here."""
    tf32 = type_of(device) == "cuda" and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """True if this CPU has matrix instructions for bfloat16 (AMX): float32 is then the slower of the two."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


@functools.cache
def cpu_dots_bfloat16() -> bool:
    """True if this CPU has vector instructions for products of bfloat16 (AVX-512 BF16), but no matrix ones: library products
    of bfloat16 are then faster than those of float32, PyTorch's fused attention in bfloat16 is not."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    with_library = torch.backends.mkldnn.is_available()
    return bool(supported and supported() and with_library and not cpu_multiplies_bfloat16())


class GpuFacts(NamedTuple):
    """What PyTorch knows about a device; zeros where it does not. clock in Hz, bandwidth in bytes/s, l2 in bytes."""

    name: str
    arch: str
    processors: int
    clock: float
    bandwidth: float
    l2: float


def gpu_facts(device: torch.device) -> GpuFacts:
    """Facts of a CUDA or ROCm device; of any other device its name, with zeros."""
    if _rehearsal.facts is not None:
        return _rehearsal.facts
    if device.type != "cuda":
        name = platform.processor() or platform.machine() if device.type == "cpu" else device.type
        return GpuFacts(name, device.type, 1, 0.0, 0.0, 0.0)
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    arch = amd.split(":")[0] if amd else f"sm_{properties.major}{properties.minor}"
    memory_clock = getattr(properties, "memory_clock_rate", 0) * 1e3  # PyTorch says kHz
    bus_bytes = getattr(properties, "memory_bus_width", 0) / 8
    return GpuFacts(
        name=properties.name,
        arch=arch,
        processors=properties.multi_processor_count,
        clock=getattr(properties, "clock_rate", 0) * 1e3,
        bandwidth=2.0 * memory_clock * bus_bytes,
        l2=float(getattr(properties, "L2_cache_size", 0)),
    )


def tune_folder() -> Path:
    """Where `fastpeft tune` keeps its tables: FASTPEFT_TUNE_DIR, else the user's cache folder."""
    named = os.environ.get("FASTPEFT_TUNE_DIR")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastpeft" / "tune"
