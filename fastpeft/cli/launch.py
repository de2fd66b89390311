"""A command in several processes on this machine, by torch.distributed's launcher: one result, one error line, one exit code.

    fastpeft train --nproc N ...  ->  N times  python -m fastpeft.cli.launch FOLDER train ...

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
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

RESULT = "result.json"
_LOOK_FOR_LAUNCHER = 0.5  # seconds
_CONNECTION_LOST = 1.0  # seconds that a process whose neighbour may have failed waits for that one's error


class ProcessError(RuntimeError):
    """What a process failed with, in one line, and the exit code of the command."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def wanted(config: Any) -> bool:
    """True if this process is to start others: it asks for more than one, and is none of a launcher's."""
    return getattr(config, "nproc", 1) > 1 and "WORLD_SIZE" not in os.environ


def launch(command: str, options: list[str], count: int) -> dict:
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
            elastic_launch(settings, sys.executable)("-m", __name__, folder, command, *options)
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


# -- in each process ----------------------------------------------------------------------------------------------------


class _Outcome:
    """Writes what went wrong inside into the folder, and takes the error from there on; `code` is the exit code."""

    def __init__(self, folder: Path, input_errors: tuple[type[BaseException], ...]):
        self.folder, self.input_errors, self.code = folder, input_errors, 0

    def __enter__(self) -> "_Outcome":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        if isinstance(error, KeyboardInterrupt):
            self.code = 130
        elif isinstance(error, self.input_errors):
            self.code = 2
        else:
            self.code = 1
            time.sleep(_CONNECTION_LOST)
            if not any(self.folder.glob("error-*.json")):  # else this one only lost its neighbour
                traceback.print_exception(kind, error, trace)
        if self.code < 130:
            self._write(error)
        return True

    def _write(self, error: BaseException) -> None:
        rank = int(os.environ["RANK"])
        message = " ".join(str(error).split()) or type(error).__name__
        value = {"time": time.time(), "rank": rank, "code": self.code, "message": message}
        draft = self.folder / f"error-{rank}.partial"
        draft.write_text(json.dumps(value), encoding="utf-8")
        draft.replace(draft.with_suffix(".json"))


def _end_with_launcher() -> None:
    """End this process when the one that started it is gone; a launcher that was killed cannot do it."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_LOOK_FOR_LAUNCHER)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(arguments: list[str]) -> int:
    """One process of a command: FOLDER COMMAND OPTIONS..."""
    from fastpeft import cli

    folder, command, *options = arguments
    _end_with_launcher()
    with _Outcome(Path(folder), cli.INPUT_ERRORS) as outcome:
        result = cli.run_command(command, options)
        if result is not None:
            (Path(folder) / RESULT).write_text(json.dumps(result), encoding="utf-8")
    return outcome.code


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:]))
