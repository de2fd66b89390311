"""README is what a newcomer follows: its commands and its table must be those of the project."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.lora_linear import table
from fastpeft.cli import COMMANDS, _parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command_under(heading: str) -> list[str]:
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    return re.findall(r"^ {4}(\S.*)$", section[1], re.MULTILINE)


def test_the_two_commands_are_one_line_each():
    assert command_under("Try it") == ['pip install ".[demo]" && fastpeft demo']
    assert command_under("Run the tests") == ['pip install -e ".[dev]" && python -m pytest -n auto']


LINES = re.findall(r"^ {4}fastpeft (.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_the_command_lines_parse(line):
    """README once showed an option that `fastpeft predict` does not have."""
    command, *options = shlex.split(line)
    _parse(importlib.import_module(f"fastpeft.cli.{command}").CONFIG, command, options)


def test_every_command_but_the_demo_is_shown():
    assert {line.split()[0] for line in LINES} == set(COMMANDS) - {"demo"}


def test_the_measured_table_is_that_of_the_results_file():
    """The table is generated: python -m benchmarks.lora_linear --json FILE prints the one and writes the other."""
    name = re.search(r"`benchmarks/results/([\w.-]+\.json)`", README)[1]
    record = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    assert table(record["rows"]) in README
    assert record["machine"]["cpu"] in README
