"""Measure fastpeft beside its peers on this machine.

python -m benchmarks run [--quick] [--op OP ...] [--case TEXT ...] [--provider NAME ...] [--json FILE]
python -m benchmarks compare BEFORE AFTER [-- options of run]     two results files, or two commits
python -m benchmarks compare ONE.json TWO.json --within 10%       do two runs of the same code give the same ratios?
python -m benchmarks report FILE [--output FOLDER]                Markdown, SVG and PNG
python -m benchmarks end-to-end [--quick] [--json FILE]           training beside PEFT, 512 to 8192 tokens
python -m benchmarks static [--check]                             what the compiler makes of the kernels; no GPU needed
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, report, tables
from benchmarks.machine import machine, named
from benchmarks.ops import ops
from benchmarks.roofline import measured
from benchmarks.running import run_case

SECONDS = {True: 1.0, False: 2.0}
SLOWEST = {True: 0.5, False: 0.125}
"""A case whose floor is above this many seconds here, with --all or without, is left out, and named."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for wrong arguments, 1 where `compare` finds a slower case or `static --check` fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="run | compare | report | end-to-end | static"
    )
    _run_options(commands.add_parser("run", help="measure, print tables"))
    two = commands.add_parser("compare", help="two results files, or two commits")
    two.add_argument("before")
    two.add_argument("after")
    two.add_argument(
        "--within",
        type=compare.percent,
        metavar="10%",
        help="two runs of the same code: 1 if any ratio at M >= 256 changed by more",
    )
    two.add_argument("options", nargs="*", help="after --: options of run, for commits")
    one = commands.add_parser("report", help="Markdown and plots of a results file")
    one.add_argument("file", type=Path)
    one.add_argument("--output", type=Path, help="folder; that of the file, named after it, by default")
    one.add_argument("--readme", action="store_true", help="print README's table instead")
    from benchmarks import end_to_end
    from benchmarks.static import add_options, static

    add_options(commands.add_parser("static", help="what the compiler makes of the kernels"))
    end_to_end.add_options(commands.add_parser("end-to-end", help="training beside PEFT, over sequence lengths"))
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            return run(options)
        if options.command == "compare":
            return compared(options)
        if options.command == "report":
            return reported(options)
        if options.command == "end-to-end":
            return end_to_end.run(options)
        return static(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run_options(parser: argparse.ArgumentParser) -> None:
    known = ops()
    providers = sorted({name for op in known.values() for name in op.providers})
    parser.add_argument("--quick", action="store_true", help="few cases, under five minutes on two cores")
    parser.add_argument(
        "--all", action="store_true", help="cases that take minutes too, and slow providers for every case"
    )
    parser.add_argument("--op", nargs="+", choices=known, default=list(known), metavar="OP", help=", ".join(known))
    parser.add_argument("--provider", nargs="+", choices=providers, metavar="NAME", help=", ".join(providers))
    parser.add_argument("--case", nargs="+", metavar="TEXT", help="cases whose op/name holds one of these")
    parser.add_argument("--seconds", type=float, help="per case and clock: 1 with --quick, else 2")
    parser.add_argument(
        "--wall", action="store_true", help="on a CPU also wall time with all threads (needs a quiet machine)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write everything to this file")


def run(options: argparse.Namespace) -> int:
    """Measure every chosen case; a provider that fails or is absent never stops the run."""
    device, seconds = torch.device(options.device), options.seconds or SECONDS[options.quick]
    chosen = {name: op for name, op in ops().items() if name in options.op}
    cases = [(op, case) for op in chosen.values() for case in op.of(options.case, options.quick)]
    if not cases:
        every = "\n  ".join(f"{op.name}/{case}" for op in chosen.values() for case in op.of(None, options.quick))
        raise ValueError(f"run: no case holds any of {options.case}; there are\n  {every}")
    roofline = measured(device)
    record: dict[str, Any] = {
        "machine": machine(device),
        "roofline": roofline.to_dict(),
        "seconds": seconds,
        "ops": {name: op.title for name, op in chosen.items()},
        "rows": [],
        "left_out": [],
    }
    print(report.origin(record), flush=True)
    begun = time.monotonic()
    for number, (op, case) in enumerate(cases, 1):
        minutes = (time.monotonic() - begun) / 60
        print(f"-- {number} of {len(cases)}: {op.name}/{case}, {minutes:.1f} min", file=sys.stderr, flush=True)
        if roofline.floor(case) > SLOWEST[options.all] and case not in op.quick:
            record["left_out"].append(f"{op.name}/{case}")
            continue
        slow = options.all or options.provider or case in op.quick
        row = run_case(
            op,
            case,
            device,
            roofline,
            seconds=seconds,
            only=options.provider,
            quick=options.quick or not slow,
            wall=options.wall,
        )
        record["rows"].append(row)
        for name in row["providers"]:
            print(" | ".join([f"{op.name}/{case}", *tables.cells(row, name, tables.clock_of(record))]), flush=True)
        if options.json:
            _write(options.json, record)
    for name, title in record["ops"].items():
        print(f"\n## {title} on {named(record['machine'])}\n\n{tables.summary_table(record, name)}")
    if record["left_out"]:
        print(f"\nleft out, too large here: {', '.join(record['left_out'])}")
    return 0


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def compared(options: argparse.Namespace) -> int:
    given = [options.before, options.after]
    if all(Path(one).is_file() for one in given):
        before, after = (compare.read_run(Path(one)) for one in given)
    else:
        before, after = (compare.run_commit(one, options.options or ["--quick"]) for one in given)
    text, slower = compare.report(before, after)
    print(text)
    if options.within is not None:
        text, beyond = compare.repeated(before, after, options.within)
        print(f"\n{text}")
        return 1 if beyond else 0
    return 1 if slower else 0


def shown_in_readme() -> list[tuple[str, str]]:
    """The cases of README's table: the quick ones."""
    return [(op.name, str(case)) for op in ops().values() for case in op.quick]


def reported(options: argparse.Namespace) -> int:
    record = compare.read_run(options.file)
    if options.readme:
        print(tables.short_table(record, shown_in_readme()))
        return 0
    folder = options.output or options.file.with_suffix("")
    for path in report.write(record, folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
