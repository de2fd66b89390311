"""One of the processes that launch.py starts: python -m fastpeft.cli.process FOLDER COMMAND OPTIONS..."""

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from fastpeft import cli
from fastpeft.cli.launch import RESULT

_LOOK_FOR_LAUNCHER = 0.5  # seconds
_CONNECTION_LOST = 1.0  # seconds that a process whose neighbour may have failed waits for that one's error


class _Outcome:
    """Writes what went wrong inside into the folder, and lets the error end there; `code` is the exit code."""

    def __init__(self, folder: Path):
        self.folder, self.code = folder, 0

    def __enter__(self) -> "_Outcome":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        if isinstance(error, KeyboardInterrupt):
            self.code = 130
        elif isinstance(error, cli.INPUT_ERRORS):
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
    """Run the command, and return the exit code."""
    folder, command, *options = arguments
    _end_with_launcher()
    with _Outcome(Path(folder)) as outcome:
        result = cli.run_command(command, options)
        if result is not None:
            (Path(folder) / RESULT).write_text(json.dumps(result), encoding="utf-8")
    return outcome.code


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:]))
