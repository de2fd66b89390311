"""What the demo prints: data, metrics before and after, examples, and where things are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastpeft.training.record import CLASSIFICATION, RunRecord

_NAMES = {"roc_auc": "ROC-AUC", "f1": "F1", "token_accuracy": "next-token accuracy"}


def show_counts(console: Console, title: str, counts: Mapping[str, Sequence[int]], columns: Sequence[str]) -> None:
    """Numbers by split."""
    table = _table("split", *columns)
    for split, numbers in counts.items():
        table.add_row(split, *(f"{number:,}" for number in numbers))
    _print(console, title, table)


def show_metrics(
    console: Console, title: str, before: Mapping[str, float], after: Mapping[str, float], names: Sequence[str]
) -> None:
    """The named metrics, with a column for `before` where it is not empty."""
    table = _table("metric", *(["before", "after"] if before else ["value"]))
    for name in names:
        if name in after:
            values = [before.get(name), after[name]] if before else [after[name]]
            cells = ("" if value is None else f"{value:.4f}" for value in values)
            table.add_row(_NAMES.get(name, name.replace("_", " ")), *cells)
    _print(console, title, table)


def show_examples(console: Console, record: RunRecord) -> None:
    """Held-out rows with the model's answers. Texts are printed as they are, never read as markup."""
    if record.task == CLASSIFICATION:
        table = _table("sentence", "true", "before", "after")
        for example in record.examples:
            right = example["after"] == example["label"]
            after = Text(f"{example['after']} {example['probability']:.0%}", style="green" if right else "red")
            table.add_row(Text(example["text"]), Text(example["label"]), Text(example.get("before", "")), after)
        _print(console, "Held-out examples", table)
        return
    console.print(Text("Held-out examples", style="bold"))
    for example in record.examples:
        table = Table(box=box.SIMPLE, show_header=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("prompt", Text(example["prompt"], style="cyan"))
        table.add_row("before", Text(example.get("before", "")))
        table.add_row("after", Text(example["after"], style="green"))
        table.add_row("reference", Text(example["response"]))
        console.print(table)


def show_outcome(console: Console, record: RunRecord, report: Path | None) -> None:
    """Parameters, time, memory and the files that were written."""
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    share = record.trainable_parameters / record.total_parameters
    table.add_row("trained", f"{record.trainable_parameters:,} of {record.total_parameters:,} parameters ({share:.2%})")
    table.add_row("time", f"{record.seconds:.0f} s ({record.cpu_seconds:.0f} s of CPU time)")
    table.add_row("peak memory", f"{record.peak_memory_mb:,.0f} MB")
    table.add_row("adapter", Text(f"{record.adapter} ({record.adapter_bytes / 1e6:.1f} MB)"))
    if report:
        table.add_row("report", Text(str(report)))
    console.print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _print(console: Console, title: str, table: Table) -> None:
    """The table under its title, which may be wider."""
    console.print(Text(title, style="bold"), table)
