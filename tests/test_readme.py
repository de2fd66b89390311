"""README is what a newcomer follows: its commands and its table must be those of the project."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from benchmarks import lora_linear, methods, training_step
from fastpeft.cli import COMMANDS, _parse
from fastpeft.training.studies.spec import read_study

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


@pytest.mark.parametrize("measured", [lora_linear, training_step], ids=["lora_linear", "training_step"])
def test_the_measured_tables_are_those_of_the_results_files(measured):
    """A table is generated: python -m benchmarks.NAME --json FILE prints the one and writes the other."""
    path = f"benchmarks/results/{measured.__name__.rpartition('.')[2]}_cpu.json"
    record = json.loads((ROOT / path).read_text(encoding="utf-8"))
    assert f"`{path}`" in README
    assert measured.table(record["rows"]) in README
    assert record["machine"]["cpu"] in README


def test_the_table_of_methods_is_that_of_the_results_file():
    record = json.loads((ROOT / methods.RESULTS).read_text(encoding="utf-8"))
    assert methods.table(record) in README
    assert f"({record['machine']['isa']})" in README


def test_the_study_that_is_shown_is_one():
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    spec = read_study(yaml.safe_load(text))
    assert [(space.method, len(space.axes)) for space in spec.methods] == [
        (m, 0) for m in ("lora", "dora", "ia3", "bitfit")
    ]
    assert spec.seeds == [0, 1, 2]
