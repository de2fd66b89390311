"""A results file as Markdown with plots beside it."""

from pathlib import Path
from typing import Any

from benchmarks.machine import named
from benchmarks.plots import draw
from benchmarks.tables import missing, op_table


def write(record: dict[str, Any], folder: Path) -> list[Path]:
    """report.md and the plots in `folder`; the files written."""
    plots = draw(record, folder)
    text = [f"# fastpeft on {named(record['machine'])}", "", origin(record), ""]
    for path in plots:
        if path.suffix == ".svg":
            text += [f"![{path.stem.replace('_', ' ')}]({path.name})", ""]
    for op, title in record["ops"].items():
        text += [f"## {title}", "", op_table(record, op), ""]
        absent = missing(record, op)
        text += [f"Absent: {name} ({why}).  " for name, why in absent.items()]
        text += [""] if absent else []
    if record.get("left_out"):
        text += ["Too large for the time limit here: " + ", ".join(record["left_out"]) + ".", ""]
    path = folder / "report.md"
    path.write_text("\n".join(text), encoding="utf-8")
    return [path, *plots]


def origin(record: dict[str, Any]) -> str:
    """How the numbers came about, in a paragraph."""
    machine, roofline = record["machine"], record["roofline"]
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in roofline["rates"].items())
    clock = "events" if "gpu" in machine else "process CPU time, one thread"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Commit {machine['commit']}, {versions}. {clock}, providers in turn, percentiles over {record['seconds']:g} s "
        "a case; ratios are medians of the rounds' own. Errors: the largest relative one of y and all gradients, against "
        "float64. Kept: bytes that autograd holds beside weights and inputs. Peak: new tensors alive at once in a step. "
        f"Roofline, measured here: {roofline['bandwidth'] / 1e9:.0f} GB/s, {rates}."
    )
