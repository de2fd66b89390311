"""A command in several processes on this machine, by torch.distributed's launcher: one result, one error line, one exit code.

    fastpeft train --nproc N ...  ->  N times  python -m fastpeft.cli.process FOLDER train ...

Each process leaves its result or its error in FOLDER. When one fails the launcher ends the others; when the launcher is gone,
however it went, they end themselves.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULT = "result.json"


class ProcessError(RuntimeError):
    """What a process failed with, in one line, and the exit code of the command."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def wanted(config: Any) -> bool:
    """True if this process is to start others: it asks for more than one, and is none of a launcher's."""
    return getattr(config, "nproc", 1) > 1 and "WORLD_SIZE" not in os.environ


def run_in_processes(command: str, options: list[str], count: int) -> dict:
    """Run a command in `count` processes, and return what rank 0 found.

    Raises:  ProcessError for the first process that failed; KeyboardInterrupt
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = max(1, (os.cpu_count() or 1) // count)
    with tempfile.TemporaryDirectory(prefix="fastpeft-") as folder, _silent_launcher():
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=Path(folder).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(settings, sys.executable)("-m", "fastpeft.cli.process", folder, command, *options)
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise ProcessError(f"{command}: ended by signal {stop.sigval}", 128 + stop.sigval) from None
        except ChildFailedError as failed:
            raise _first_error(Path(folder), command, failed) from None
        return json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))


def _first_error(folder: Path, command: str, failed: Any) -> ProcessError:
    """The error that was written first; without one, how the first process ended."""
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("error-*.json")]
    if errors:
        first = min(errors, key=lambda error: error["time"])
        where = "" if first["code"] == 2 else f"{command}: process {first['rank']}: "
        return ProcessError(where + first["message"], first["code"])
    rank, failure = failed.get_first_failure()
    return ProcessError(f"{command}: process {rank} ended with exit code {failure.exitcode}", 1)


@contextlib.contextmanager
def _silent_launcher() -> Iterator[None]:
    """The launcher's own logs repeat an error in some fifty lines."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
