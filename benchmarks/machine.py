"""What a result depends on besides the code: hardware, driver, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "liger-kernel",
    "unsloth",
    "flash-attn",
    "xformers",
)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Names and versions, for a results file."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "isa": " ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in _flags()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": versions(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_GiB"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _driver()
    return found


def named(record: dict[str, Any]) -> str:
    """The hardware of a record in words."""
    if "gpu" in record:
        return f"{record['gpu']}, driver {record['driver']}"
    return f"{record['cpu']} ({record['isa']}), {record['cores']} cores"


def versions() -> dict[str, str]:
    """Installed versions of this library's peers, absent ones left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is checked out, with "+" if files differ from it; "" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def _cpu() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _flags() -> str:
    return next((line for line in _cpuinfo() if line.startswith("flags")), "")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
