"""Two runs side by side: files, or commits that are run here one after the other."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.tables import clock_of, duration, markdown

SLOWER = 1.10
"""A case counts as slower from this ratio on: the spread of repeated runs on a busy machine."""


def read_run(path: Path) -> dict[str, Any]:
    """A results file of `python -m benchmarks run`.

    Raises:  ValueError for a file that is not one
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"compare: expected a results file of `run --json`, got {path}: {error}") from error
    if not isinstance(record, dict) or not {"rows", "machine"} <= record.keys():
        raise ValueError(f"compare: expected a results file of `run --json`, got {path} without rows and machine")
    return record


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """fastpeft's time in both runs, case by case, told relative to the case's baseline provider where both have it.

    Another machine, or the same one busier, slows both; the baseline's time takes that out.
    """
    clock = clock_of(after)
    earlier = {(row["op"], row["case"]): row["providers"] for row in before["rows"]}
    found = []
    for row in after["rows"]:
        old, new = earlier.get((row["op"], row["case"])), row["providers"]
        times = [one.get("fastpeft", {}).get(f"{clock}_us", [math.nan] * 3)[1] for one in (old or {}, new)]
        if any(map(math.isnan, times)):
            continue
        base = [one.get(row["baseline"], {}).get(f"{clock}_us", [math.nan] * 3)[1] for one in (old, new)]
        same = not any(map(math.isnan, base))
        ratio = (times[1] / base[1]) / (times[0] / base[0]) if same else times[1] / times[0]
        found.append({"op": row["op"], "case": row["case"], "before": times[0], "after": times[1], "ratio": ratio})
    return found


def report(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, int]:
    """(table, number of cases that are slower by SLOWER or more)."""
    found = changes(before, after)
    slower = [one for one in found if one["ratio"] >= SLOWER]
    rows = [
        [one["op"], one["case"], duration(one["before"]), duration(one["after"]), f"{one['ratio']:.2f}"]
        for one in sorted(found, key=lambda one: -one["ratio"])
    ]
    names = [str(record["machine"].get("commit", "?")) for record in (before, after)]
    table = markdown(["op", "case", names[0], names[1], "after / before, over the baseline"], rows)
    return f"{table}\n\n{len(found)} cases in both runs, {len(slower)} slower by {SLOWER - 1:.0%} or more", len(slower)


def spread(before: dict[str, Any], after: dict[str, Any], rows: int = 256) -> list[tuple[float, str]]:
    """How far every provider's ratio over its baseline moved between two runs, in cases of `rows` rows or more.

    (the larger ratio over the smaller - 1, op/case/provider), largest first; rows of a case: m, batch x tokens, or size.
    """
    clock = clock_of(after)
    earlier = {(row["op"], row["case"]): row["providers"] for row in before["rows"]}
    found = []
    for row in after["rows"]:
        sizes = row["sizes"]
        m = sizes.get("m") or sizes.get("batch", 1) * sizes.get("tokens", 0) or sizes.get("size", 0)
        for name, one in row["providers"].items() if m >= rows else ():
            old = earlier.get((row["op"], row["case"]), {}).get(name, {}).get(f"{clock}_speedup")
            new = one.get(f"{clock}_speedup")
            if old and new:
                found.append((max(old, new) / min(old, new) - 1, f"{row['op']}/{row['case']}/{name}"))
    return sorted(found, reverse=True)


def repeated(before: dict[str, Any], after: dict[str, Any], within: float) -> tuple[str, int]:
    """(what two runs of the same code differ in, number of ratios that differ by more than `within`).

    Raises:  ValueError where no case of 256 rows or more is in both runs
    """
    found = spread(before, after)
    if not found:
        raise ValueError("compare --within: expected two runs with a case of 256 rows or more in both, got none")
    beyond = [one for one in found if one[0] > within]
    lines = [f"{change:7.1%}  {name}" for change, name in found[: max(5, len(beyond))]]
    lines.append(f"{len(found)} ratios at M >= 256, {len(beyond)} changed by more than {within:.0%}")
    return "\n".join(lines), len(beyond)


def percent(text: str) -> float:
    """ "10%" or "0.1" as 0.1.

    Raises:  ValueError for anything else
    """
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value < math.inf:
        raise ValueError(f"expected a positive part such as 10%, got {text}")
    return value


def run_commit(revision: str, arguments: list[str]) -> dict[str, Any]:
    """Run the suite as it is at `revision`, in a work tree of its own, with this Python."""
    folder = Path(tempfile.mkdtemp())
    result = folder / "run.json"
    try:
        _git("worktree", "add", "--detach", str(folder / "tree"), revision)
        command = [sys.executable, "-m", "benchmarks", "run", "--json", str(result), *arguments]
        print(f"compare: running the suite at {revision}", file=sys.stderr, flush=True)
        done = subprocess.run(command, cwd=folder / "tree", capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"compare: the suite failed at {revision}: {said}")
        return read_run(result)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder / "tree")], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"compare: expected two results files or two commits, git says: {done.stderr.strip()}")
