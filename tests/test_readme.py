"""README is what a newcomer follows: its commands and its table must be those of the project."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import accelerate, end_to_end, methods, serving, tables
from benchmarks.__main__ import shown_in_readme
from benchmarks.machine import named
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


def record_of(path):
    assert f"`{path}`" in README
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def test_the_table_of_a_training_step_is_that_of_its_results_file():
    """python -m benchmarks.accelerate --json FILE prints the one and writes the other."""
    record = record_of(accelerate.RESULTS)
    assert accelerate.table(record["rows"]) in README
    assert named(record["machine"]) in README


def test_the_table_of_fine_tuning_is_that_of_its_results_file():
    """python -m benchmarks end-to-end --report FILE prints it."""
    record = record_of(end_to_end.RESULTS)
    assert end_to_end.readme_table(record) in README
    assert named(record["machine"]) in README


def test_the_table_of_ops_is_that_of_its_results_file():
    """python -m benchmarks report FILE --readme prints it."""
    record = record_of("benchmarks/results/cpu.json")
    assert tables.short_table(record, shown_in_readme()) in README
    assert named(record["machine"]) in README


def test_the_table_of_methods_is_that_of_the_results_file():
    record = json.loads((ROOT / methods.RESULTS).read_text(encoding="utf-8"))
    assert methods.table(record) in README
    assert f"({record['machine']['isa']})" in README


def test_the_table_of_serving_is_that_of_its_results_file():
    """python -m benchmarks.serving --json FILE prints the one and writes the other."""
    record = record_of(serving.RESULTS)
    assert serving.table(record["rows"]) in README
    assert named(record["machine"]) in README
    assert all((row["errors"], row["wrong_adapter"]) == (0, 0) for row in record["rows"])


def test_the_study_that_is_shown_is_one():
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert (ROOT / "examples/study.yaml").read_text(encoding="utf-8").partition("\n")[2] == text
    spec = read_study(ROOT / "examples/study.yaml")
    assert [(space.method, len(space.axes)) for space in spec.methods] == [
        (m, 0) for m in ("lora", "dora", "ia3", "bitfit")
    ]
    assert spec.seeds == [0, 1, 2]
