"""What `fastpeft tune` measured on this machine: one JSON file per device and versions.

    {"machine": {...}, "seconds": {problem key: {rows: {algorithm: seconds}}}}

Measured by one version of PyTorch, Triton and fastpeft, a table says nothing about another: versions are in its name.
"""

import functools
import importlib.metadata
import json
import os
import re
import warnings
from pathlib import Path

import torch

from fastpeft import __version__, backend

Seconds = dict[str, dict[str, dict[str, float]]]


def machine_description(device: torch.device) -> dict[str, str]:
    """What a measurement depends on besides the problem."""
    return dict(_described(device, torch.get_num_threads()))


@functools.lru_cache(maxsize=16)
def _described(device: torch.device, threads: int) -> dict[str, str]:
    """Looked up once: a version takes a millisecond to find, and a choice is made for every new number of rows."""
    facts = backend.gpu_facts(device)
    described = {"device": facts.name, "arch": facts.arch, "processors": str(facts.processors)}
    for package in ("torch", "triton"):
        try:
            described[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            described[package] = "none"
    described["fastpeft"] = __version__
    if device.type == "cpu":
        described["threads"] = str(threads)
        described["isa"] = torch.backends.cpu.get_cpu_capability()
    return described


def table_path(device: torch.device) -> Path:
    """The file of this device and these versions; it need not exist."""
    name = "_".join(machine_description(device).values())
    return backend.tune_folder() / (re.sub(r"[^\w.+-]+", "-", name) + ".json")


def read_table(device: torch.device) -> Seconds:
    """What was measured for `device`; empty without a file, and with a warning where the file cannot be read."""
    return _read(table_path(device))


@functools.lru_cache(maxsize=16)
def _read(path: Path) -> Seconds:
    try:
        seconds = json.loads(path.read_text())["seconds"]
        for by_rows in seconds.values():
            for times in by_rows.values():
                if not times or not all(isinstance(value, (int, float)) for value in times.values()):
                    raise ValueError("a measurement without times")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        warnings.warn(
            f"tune table {path}: expected what `fastpeft tune` writes, got {error!r}; not used. Delete it and tune again",
            stacklevel=2,
        )
        return {}
    return seconds


def write_table(device: torch.device, seconds: Seconds) -> Path:
    """Replace the file in one step, so that an interrupted run leaves the measurements before."""
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(
        json.dumps({"machine": machine_description(device), "seconds": seconds}, indent=1, sort_keys=True) + "\n"
    )
    unfinished.replace(path)
    _read.cache_clear()
    return path
