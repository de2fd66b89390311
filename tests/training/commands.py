"""Command lines for the tests of `fastpeft`, and what they print."""

import json
from pathlib import Path
from typing import Any

from fastpeft.cli import main


def train_command(files: Path, model: str, data: str, output: Path, *more: Any) -> list[str]:
    """fastpeft train of a model and data in `files`, on the CPU."""
    flags = ["--model", files / model, "--data", files / data, "--output-dir", output, "--use-cpu", *more]
    return ["train", *map(str, flags)]


def result(capsys: Any) -> dict[str, Any]:
    """The JSON object on the last line of standard output."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fails(capsys: Any, arguments: list[Any], reason: str) -> None:
    """The command exits with 2 and one line on standard error that starts with `error: ` and contains `reason`."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert reason in last
