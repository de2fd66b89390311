"""Results as tables: losses stand beside wins, and a provider whose result is wrong has no speed-up."""

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]


def clock_of(record: Record) -> str:
    """The clock that a record's ratios are told by: "gpu" or "cpu"."""
    return "gpu" if "gpu" in record["machine"] else "cpu"


def speedup(provider: dict[str, Any], clock: str) -> str:
    """The provider's ratio over the baseline in words; none where its result failed the comparison with float64."""
    if not provider.get("correct", True):
        return "wrong result"
    value = provider.get(f"{clock}_speedup")
    return "" if value is None else f"{value:.2f}"


def size(count: float | None) -> str:
    """Bytes in kB or MB."""
    if count is None:
        return ""
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.0f} kB"


def duration(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e4 else f"{microseconds:.0f} us"


HEAD = ("case", "provider", "p50", "p20 to p80", "over {baseline}", "of the roofline", "kept", "peak", "error")


def cells(row: Record, name: str, clock: str) -> list[str]:
    """One provider's cells, in HEAD's order but for the case."""
    one = row["providers"][name]
    if "absent" in one or "failed" in one:
        return [
            name,
            "",
            "",
            f"{'absent' if 'absent' in one else 'failed'}: {one.get('absent', one.get('failed'))}",
            *[""] * 4,
        ]
    low, middle, high = one[f"{clock}_us"]
    return [
        name,
        duration(middle),
        f"{duration(low)} to {duration(high)}",
        speedup(one, clock),
        f"{one['roofline_percent']:.0f} %",
        size(one.get("saved_bytes")),
        size(one.get("peak_bytes")),
        f"{one['error']:.1e}" if "error" in one else "",
    ]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def op_table(record: Record, op: str, *, absent: bool = False) -> str:
    """Every case of one op, a line per provider; who is absent in all cases is left out, and named by `missing`."""
    clock, rows = clock_of(record), [row for row in record["rows"] if row["op"] == op]
    out = [] if absent else missing(record, op)
    lines = []
    for row in rows:
        names = [name for name in row["providers"] if name not in out]
        lines += [[row["case"] if i == 0 else "", *cells(row, name, clock)] for i, name in enumerate(names)]
    head = [text.format(baseline=rows[0]["baseline"] if rows else "") for text in HEAD]
    return markdown(head, lines)


def missing(record: Record, op: str) -> dict[str, str]:
    """Providers of an op that were absent in every case, with the first reason."""
    reasons: dict[str, list[str | None]] = {}
    for row in record["rows"]:
        if row["op"] == op:
            for name, one in row["providers"].items():
                reasons.setdefault(name, []).append(one.get("absent"))
    return {name: its[0] for name, its in reasons.items() if all(its)}


def summary(row: Record, clock: str) -> list[str]:
    """One case in one line: the baseline's time, fastpeft's, the ratio, and what both keep."""
    theirs, ours = row["providers"].get(row["baseline"], {}), row["providers"].get("fastpeft", {})
    return [
        duration(theirs[f"{clock}_us"][1]) if f"{clock}_us" in theirs else "absent",
        duration(ours[f"{clock}_us"][1]) if f"{clock}_us" in ours else "failed",
        speedup(ours, clock),
        f"{ours['roofline_percent']:.0f} %" if "roofline_percent" in ours else "",
        size(theirs.get("saved_bytes")),
        size(ours.get("saved_bytes")),
    ]


def summary_table(record: Record, op: str) -> str:
    """The cases of one op, a line each."""
    clock, rows = clock_of(record), [row for row in record["rows"] if row["op"] == op]
    baseline = rows[0]["baseline"] if rows else ""
    head = ["case", baseline, "fastpeft", "ratio", "of the roofline", f"{baseline} keeps", "fastpeft keeps"]
    return markdown(head, [[row["case"], *summary(row, clock)] for row in rows])


def short_table(record: Record, shown: Iterable[tuple[str, str]]) -> str:
    """The (op, case)s in `shown`, of all ops: README's table."""
    clock, shown = clock_of(record), set(shown)
    head = ["op", "case", "beside", "its time", "fastpeft", "ratio", "of the roofline", "it keeps", "fastpeft keeps"]
    rows = [row for row in record["rows"] if (row["op"], row["case"]) in shown]
    return markdown(
        head, [[record["ops"][row["op"]], row["case"], row["baseline"], *summary(row, clock)] for row in rows]
    )
