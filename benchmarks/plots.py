"""Plots of a results file: speed over rows, memory over sequence length, the roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import named
from benchmarks.tables import clock_of

COLOURS = {
    "fastpeft": "#c2410c",
    "frozen": "#737373",
    "eager": "#0369a1",
    "peft": "#15803d",
    "sdpa": "#15803d",
    "torch.compile": "#7c3aed",
}
MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(record: dict[str, Any], folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Every plot that the record has rows for, into `folder`; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in (
        ("speed_over_rows", speed_over_rows),
        ("memory_over_tokens", memory_over_tokens),
        ("roofline", roofline),
    ):
        figure = plot(record)
        if figure is None:
            continue
        written += save(figure, record, folder, name, formats)
    return written


def save(figure, record: dict[str, Any], folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Write the figure, which names the hardware, once per format."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "fastpeft"
    figure.suptitle(_origin(record), fontsize=7, color="#525252", y=0.02, va="bottom")
    paths = [folder / f"{name}.{kind}" for kind in formats]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    _close(figure)
    return paths


def _origin(record: dict[str, Any]) -> str:
    machine = record["machine"]
    threads = "" if "gpu" in machine else ", one thread"
    return f"{named(machine)}{threads}, torch {machine['versions'].get('torch', '?')}, commit {machine['commit']}"


def figure_of(columns: int = 1, width: float = 5.6):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 4.2), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _close(figure) -> None:
    figure.clear()


def _present(row: dict[str, Any], clock: str) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in row["providers"].items() if f"{clock}_us" in one}


def speed_over_rows(record: dict[str, Any]):
    """Time of a LoRA linear's step per row over the number of rows, a panel per shape."""
    clock, panels = clock_of(record), {}
    for row in record["rows"]:
        sizes = row["sizes"]
        plain = (
            row["op"] == "lora"
            and sizes["base"] == "dense"
            and not sizes["dropout"]
            and not sizes["dora"]
            and sizes["backward"]
        )
        if plain and (sizes["r"], sizes["dtype"], sizes["adapters"]) == (16, "bfloat16", "float32"):
            panels.setdefault((sizes["model"], sizes["site"]), []).append(row)
    panels = {key: rows for key, rows in panels.items() if len(rows) > 2}
    shown = [key for key in panels if key[1] == "q"][:3]
    if not shown:
        return None
    figure, axes = figure_of(len(shown), 4.4)
    for axis, key in zip(axes, shown):
        for name in dict.fromkeys(name for row in panels[key] for name in _present(row, clock)):
            points = [
                (row["sizes"]["m"], row["providers"][name][f"{clock}_us"][1] / row["sizes"]["m"])
                for row in panels[key]
                if name in _present(row, clock)
            ]
            line(axis, points, name)
        axis.set(xscale="log", yscale="log", xlabel="rows M", title=f"{key[0]}, {key[1]} projection, r = 16")
        ticks(axis, [row["sizes"]["m"] for row in panels[key]])
    axes[0].set_ylabel("forward + backward, us per row")
    lines = {one.get_label(): one for axis in axes for one in axis.lines}
    axes[-1].legend(lines.values(), lines, fontsize=8, frameon=False)
    return figure


def memory_over_tokens(record: dict[str, Any]):
    """Peak bytes of an attention step over the sequence length, for one head and batch size."""
    clock, points = clock_of(record), {}
    for row in record["rows"]:
        sizes = row["sizes"]
        if (
            row["op"] == "attention"
            and sizes.get("causal")
            and sizes["backward"]
            and not sizes["window"]
            and not sizes["softcap"]
            and not sizes["bias"]
            and (sizes["dtype"], sizes["heads"], sizes["kv_heads"]) == ("float32", 2, 2)
        ):
            measured = {name: one for name, one in _present(row, clock).items() if "peak_bytes" in one}
            for name, one in measured.items():
                tokens, heads = sizes["tokens"], sizes["batch"] * sizes["heads"]
                points.setdefault(name, {})[tokens] = one["peak_bytes"] / heads / 2**20
    points = {name: its for name, its in points.items() if len(its) > 1}
    if not points:
        return None
    figure, (axis,) = figure_of()
    for name, its in points.items():
        line(axis, its.items(), name)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="tokens S",
        ylabel="peak of new tensors, MB per head",
        title="Causal attention, forward + backward, fp32",
    )
    ticks(axis, sorted({tokens for its in points.values() for tokens in its}))
    axis.legend(fontsize=8, frameon=False)
    return figure


def roofline(record: dict[str, Any]):
    """FLOP/s reached over FLOP per byte, under the machine's measured bandwidth and rates."""
    import numpy as np

    clock, top = clock_of(record), record["roofline"]
    figure, (axis,) = figure_of(width=6.4)
    intensities = [row["flops"] / row["bytes"] for row in record["rows"] if row["flops"]]
    if not intensities:
        return None
    x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 100)
    for number, (dtype, rate) in enumerate(top["rates"].items()):
        axis.plot(
            x,
            np.minimum(rate, top["bandwidth"] * x) / 1e9,
            color="#404040",
            ls=("-", "--", ":")[number],
            lw=1,
            label=f"measured peak, {dtype}",
        )
    for number, op in enumerate(dict.fromkeys(row["op"] for row in record["rows"])):
        reached = [
            (row["flops"] / row["bytes"], row["flops"] / row["providers"]["fastpeft"][f"{clock}_us"][1] / 1e3)
            for row in record["rows"]
            if row["op"] == op and row["flops"] and "fastpeft" in _present(row, clock)
        ]
        if reached:
            axis.scatter(
                *zip(*reached), s=18, marker=MARKERS[number % len(MARKERS)], label=f"fastpeft, {op}", alpha=0.8
            )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per compulsory byte",
        ylabel="GFLOP/s",
        title="Roofline of this machine",
    )
    axis.legend(fontsize=7, frameon=False)
    return figure


def line(axis, points, name: str, ls: str = "-", ms: float = 3.5) -> None:
    axis.plot(
        *zip(*sorted(points)),
        marker="o",
        ms=ms,
        ls=ls,
        lw=3 if name == "fastpeft" else 1.2,
        zorder=1.9 if name == "fastpeft" else 2,  # a peer with the same values shows on top
        color=COLOURS.get(name),
        label=name,
    )


def ticks(axis, values) -> None:
    axis.set_xticks(values, [str(value) for value in values], fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.25)
