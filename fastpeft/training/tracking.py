"""Where a run's losses and metrics go beside run.json: TensorBoard, Weights & Biases, MLflow, by transformers' integrations."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""Tracker -> packages of which one must be installed; the first is the one to install."""
NONE = "none"


def trackers(report_to: Sequence[str] | None) -> list[str]:
    """The trackers of a run: those that are asked for, or by default TensorBoard where it is installed.

    Raises:  ValueError for a name that is not one, or a package that is missing
    """
    if report_to is None:
        return ["tensorboard"] if _installed("tensorboard") else []
    check_tracker_names(report_to)
    wanted = [name for name in dict.fromkeys(report_to) if name != NONE]
    for name in wanted:
        if not _installed(name):
            raise ValueError(f"report_to: {name} is not installed; pip install {PACKAGES[name][0]}")
    return wanted


@contextlib.contextmanager
def own_tracks(names: Sequence[str]) -> Iterator[None]:
    """Inside, a training logs to runs of its own at its trackers, and they end with it; to the caller's where that has begun one.

    transformers leaves a run of W&B open, where the next training of the process would go on, and MLflow's after an error.
    """
    modules = [importlib.import_module(name) for name in names if name in ("wandb", "mlflow")]
    begun = [module for module in modules if not _active(module)]
    failed = True
    try:
        yield
        failed = False
    finally:
        for module in begun:
            if not _active(module):
                continue
            if module.__name__ == "wandb":
                module.finish(exit_code=int(failed))
            else:
                module.end_run("FAILED" if failed else "FINISHED")


def _active(module: Any) -> bool:
    return (module.run if module.__name__ == "wandb" else module.active_run()) is not None


def check_tracker_names(report_to: Sequence[str]) -> None:
    """Raise a ValueError for a name that is neither a tracker nor "none", and for "none" beside a tracker."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    known = [*PACKAGES, NONE]
    unknown = [name for name in names if name not in known]
    if isinstance(report_to, str) or unknown:
        raise ValueError(f"report_to: expected a list of names from {known}, got {report_to!r}")
    if NONE in names and len(set(names)) > 1:
        raise ValueError(f"report_to: expected either {NONE!r} or trackers, got {names}")


def _installed(name: str) -> bool:
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES[name])
