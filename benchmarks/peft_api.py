"""PEFT's public names beside ours: same, different (why), or absent (why).

    python -m benchmarks.peft_api          writes benchmarks/results/peft_api.md

Same: the name is there, and takes every argument of PEFT's by its name (a config field: with PEFT's default). The tables are made
from the installed peft; what is not the same needs a reason in peft_api_reasons.py.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import fastpeft
from benchmarks.peft_api_reasons import ABSENT, DIFFERENT, by_name
from fastpeft.methods import METHODS
from fastpeft.tuner import Tuner

RESULT = Path(__file__).parent / "results" / "peft_api.md"
ORDER = ("same", "different", "absent")


@dataclasses.dataclass(frozen=True)
class Row:
    """One name of PEFT. state: same, different or absent; why: the reason where it is not the same."""

    name: str
    state: str
    why: str = ""


def functions() -> list[Row]:
    """Names of `peft`."""
    return [_row(name, getattr(peft, name), getattr(fastpeft, name, None)) for name in sorted(peft.__all__)]


def model_members() -> list[Row]:
    """Methods and properties of PeftModel, and of the tuner below it, which PEFT's names as base_model."""
    rows = []
    tuners = {**vars(BaseTuner), **vars(peft.LoraModel)}
    for prefix, theirs, ours in (
        ("PeftModel", vars(peft.PeftModel), fastpeft.PeftModel),
        ("base_model", tuners, Tuner),
    ):
        names = sorted(name for name in theirs if not name.startswith("_") and name not in vars(nn.Module))
        names = [name for name in names if name not in ("forward", "active_adapters") or prefix == "PeftModel"]
        rows += [_row(f"{prefix}.{name}", theirs[name], inspect.getattr_static(ours, name, None)) for name in names]
    return rows


def config_fields() -> dict[str, list[Row]]:
    """Fields of the config of every method that both have, by peft_type; a field with another default says so."""
    tables = {}
    for kind, ours in METHODS.items():
        theirs = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
        if theirs is None or not ours.known_to_peft:
            continue
        have = {item.name: item for item in dataclasses.fields(ours)}
        tables[kind] = [_field(item, have.get(item.name)) for item in dataclasses.fields(theirs)]
    return tables


def _field(theirs: dataclasses.Field, ours: dataclasses.Field | None) -> Row:
    if ours is None:
        return Row(theirs.name, "absent", _reason(ABSENT, theirs.name))
    if _default(theirs) == _default(ours):
        return Row(theirs.name, "same")
    return Row(theirs.name, "different", f"default {_default(ours)!r} instead of {_default(theirs)!r}")


def _default(item: dataclasses.Field) -> Any:
    value = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return getattr(value, "value", value)


def _row(name: str, theirs: Any, ours: Any) -> Row:
    if ours is None:
        return Row(name, "absent", _reason(ABSENT, name))
    missing = [argument for argument in _arguments(theirs) if argument not in _arguments(ours)]
    callable_both = not inspect.isclass(theirs) and _arguments(theirs)
    return Row(name, "different", _reason(DIFFERENT, name)) if callable_both and missing else Row(name, "same")


def _arguments(value: Any) -> list[str]:
    """Names of the arguments, without self, cls, *args and **kwargs; none for what is not called."""
    function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    if not inspect.isfunction(function):
        return []
    parameters = inspect.signature(function).parameters.values()
    loose = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [item.name for item in parameters if item.kind not in loose and item.name not in ("self", "cls")]


def _reason(table: dict[str, tuple[str, ...]], name: str) -> str:
    """Raises KeyError with what to do for a name without one."""
    reasons = by_name(table)
    if name not in reasons:
        kind = "absent" if table is ABSENT else "different"
        raise KeyError(
            f"peft_api: {name} of peft {peft.__version__} is {kind} here; say why in benchmarks/peft_api_reasons.py"
        )
    return reasons[name]


def grouped(rows: list[Row]) -> str:
    """A table with one line per state and reason, which names all that it is said of."""
    lines = ["| | names | why |", "|---|---|---|"]
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.state, row.why), []).append(f"`{row.name}`")
    for (state, why), names in sorted(groups.items(), key=lambda group: ORDER.index(group[0][0])):
        lines.append(f"| {state} | {', '.join(names)} | {why.replace('|', '/')} |")
    return "\n".join(lines)


def counted(rows: list[Row]) -> str:
    """3 same, 1 different, 2 absent"""
    return ", ".join(f"{sum(row.state == state for row in rows)} {state}" for state in ORDER)


def document() -> str:
    """The Markdown of the results file."""
    parts = [
        f"# PEFT {peft.__version__} beside fastpeft\n\nMade by `python -m benchmarks.peft_api`; do not edit. "
        "Same: the name is here and takes PEFT's arguments.\nMethods that PEFT lacks: "
        + (", ".join(kind for kind, config in METHODS.items() if not config.known_to_peft) or "none")
        + ".",
        f"## Names of `peft`: {counted(functions())}\n\n{grouped(functions())}",
        f"## Members of PeftModel and base_model: {counted(model_members())}\n\n{grouped(model_members())}",
    ]
    for kind, rows in config_fields().items():
        parts.append(f"## Fields of {METHODS[kind].__name__}: {counted(rows)}\n\n{grouped(rows)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    RESULT.write_text(document(), encoding="utf-8")
    print(RESULT)
