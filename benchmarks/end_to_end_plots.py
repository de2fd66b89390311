"""Plots of an end-to-end results file: losses over steps, tokens/s and peak memory over the sequence length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end import TITLES
from benchmarks.plots import figure_of, line, save, ticks

NAMES = {"peft": "peft", "peft_accelerated": "PEFT + accelerate", "fastpeft_accelerated": "fastpeft"}
STYLES = ("-", "--", ":")


def draw(record: dict[str, Any], folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Every plot, into `folder`; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in record["rows"] if "losses" in row and row["provider"] in TITLES]
    written = []
    for name, plot in (("losses", losses), ("tokens_per_second", tokens_per_second), ("peak_memory", peak_memory)):
        figure = plot(rows)
        if figure is not None:
            written += save(figure, record, folder, name, formats)
    return written


def _panels(rows: list[dict[str, Any]]):
    cases = list(dict.fromkeys(row["case"] for row in rows))
    if not cases:
        return None, []
    figure, axes = figure_of(len(cases), 4.4 if len(cases) > 1 else 6.4)
    for axis, case in zip(axes, cases):
        axis.set_title(case)
    return figure, [(axis, [row for row in rows if row["case"] == case]) for axis, case in zip(axes, cases)]


def losses(rows: list[dict[str, Any]]):
    """Training losses of the shortest rows, where most steps were taken, all providers over each other."""
    figure, panels = _panels(rows)
    for axis, its in panels:
        tokens = min(row["tokens"] for row in its)
        for number, row in enumerate(row for row in its if row["tokens"] == tokens):
            values = row["losses"]
            line(axis, list(enumerate(values, 1)), NAMES[row["provider"]], ls=STYLES[number % 3], ms=0)
        axis.set(xlabel="step", ylabel=f"training loss, nats per token (rows of {tokens})")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    return figure


def tokens_per_second(rows: list[dict[str, Any]]):
    """Of one thread's process CPU time, over the sequence length."""
    return _over_length(rows, "cpu_tokens_per_s", "tokens per second of CPU time")


def peak_memory(rows: list[dict[str, Any]]):
    """Resident high-water mark during steps, over the sequence length."""
    return _over_length(rows, "peak_MB", "peak resident memory, MB")


def _over_length(rows: list[dict[str, Any]], figure_of_row: str, label: str):
    rows = [row for row in rows if figure_of_row in row]
    figure, panels = _panels(rows)
    for axis, its in panels:
        for provider in dict.fromkeys(row["provider"] for row in its):
            points = [(row["tokens"], row[figure_of_row]) for row in its if row["provider"] == provider]
            line(axis, points, NAMES[provider])
        axis.set(xscale="log", xlabel="tokens S in the row", ylabel=label)
        axis.set_ylim(bottom=0)
        ticks(axis, sorted({row["tokens"] for row in its}))
        axis.legend(fontsize=8, frameon=False)
    return figure
