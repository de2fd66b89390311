"""What the compiler makes of the kernels, without a GPU: every kernel x configuration x target.

    python -m benchmarks static [--arch sm_90 ...] [--kernel TEXT ...] [--check] [--traffic] [--peers] [--json FILE]

Compiling takes one process a target, as many at once as there are cores, and is kept on disk by what it depends on (kernels,
launchers, compiler), so a second run prints at once. --check holds the metrics to tests/aot/baseline.json and the gates; the
tests run it for every target. --traffic adds the bytes that launches ask for in Triton's interpreter over the compulsory ones.
--peers compiles the Triton tutorials' product and attention and, where it is installed, Liger-Kernel in the same run, for the
targets that they have tiles for; --liger FILE writes the latter beside ours (benchmarks/results/static_peers.md).

Registers, spills, shared memory and instruction counts are exact for this compiler. The predicted bound is what
takes most cycles of one turn of the main loop: the tensor cores, issuing (or the pipe in brackets), or DRAM where nothing is read
twice. Latency, caches and real clocks are not in it.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown
from tests.aot import liger_peers
from tests.aot.cached import reports_of
from tests.aot.compile import ARCHS, SHIPPED, merged
from tests.aot.gates import failures_of, read_baseline
from tests.aot.metrics import Metrics

PEERS = ("tests.aot.peers", "tests.aot.attention_peers", "tests.aot.liger_peers")
HEAD = (
    "target",
    "kernel",
    "registers",
    "spills",
    "in loop",
    "shared KiB",
    "blocks/SM",
    "loop",
    "most of it",
    "16-byte loads",
    "tensor share",
    "bound",
)
MIX = 5
"""Instructions of the main loop that are named, those that occur most; --json writes all."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS), metavar="ARCH", help=", ".join(ARCHS))
    parser.add_argument("--kernel", nargs="+", metavar="TEXT", help="kernels whose name holds one of these")
    parser.add_argument("--check", action="store_true", help="hold the metrics to the gates and the committed baseline")
    parser.add_argument("--traffic", action="store_true", help="bytes in the interpreter over the compulsory ones")
    parser.add_argument(
        "--peers", action="store_true", help="compile the Triton tutorials' kernels and Liger-Kernel's too"
    )
    parser.add_argument(
        "--liger", type=Path, metavar="FILE", help="with --peers: write Liger-Kernel's table to this file"
    )
    parser.add_argument(
        "--cases", nargs="+", metavar="MODULE", help="modules with aot_cases(arch), in place of the shipped"
    )
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile at once")


def static(options: argparse.Namespace) -> int:
    """Print the table; 1 if --check finds a failure."""
    if options.jobs < 1:
        raise ValueError(f"static: --jobs: expected 1 or more, got {options.jobs}")
    modules = options.cases or SHIPPED
    unknown = [module for module in modules if not _has_cases(module)]
    if unknown:
        known, got = ", ".join(SHIPPED), ", ".join(unknown)
        raise ValueError(f"static: --cases: expected modules with aot_cases, as {known}; got {got}")
    if options.liger and not (options.peers and liger_peers.is_there()):
        raise ValueError(
            f"static: --liger: expected --peers and an importable Liger-Kernel; it is: {liger_peers.version()}"
        )
    reports = reports_of(options.arch, modules, options.jobs)
    peers = reports_of(options.arch, PEERS, options.jobs, keep_going=True) if options.peers else {}
    chosen = [
        (arch, name, Metrics(**case["metrics"]))
        for (arch, _), report in [*reports.items(), *peers.items()]
        for name, case in report["cases"].items()
        if options.kernel is None or any(text in name for text in options.kernel)
    ]
    if not chosen:
        names = sorted({name for report in [*reports.values(), *peers.values()] for name in report["cases"]})
        raise ValueError(f"static: no kernel's name holds any of {options.kernel}; there are {', '.join(names)}")
    print(markdown(HEAD, [row(arch, name, metrics) for arch, name, metrics in chosen]))
    for line in absent(peers) if options.peers else ():
        print(line)
    if options.traffic:
        from benchmarks.traffic import table

        print("\n" + table())
    if options.json:
        _write(options.json, {**reports, **peers})
    if options.liger:
        _write_liger(options.liger, peers)
    return _held(reports) if options.check else 0


def _has_cases(module: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), "aot_cases")
    except ModuleNotFoundError:
        return False


def _held(reports: dict[tuple[str, str], dict[str, Any]]) -> int:
    """Print what gates and baseline say; 1 if something fails."""
    recorded, compiler = read_baseline()["triton"], next(iter(reports.values()))["triton"]
    if recorded != compiler:
        print(f"baseline.json is of Triton {recorded}, this is {compiler}: absolute gates only")
    failures = checked(reports)
    print("\n".join(failures) if failures else "every gate holds")
    return 1 if failures else 0


def checked(reports: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Violations of the gates and of the baseline, target by target; other modules than all of SHIPPED know no baseline."""
    baseline, failures = read_baseline(), []
    if {module for _, module in reports} != set(SHIPPED):
        baseline |= {"triton": "", "exceptions": {}}
    for arch in dict.fromkeys(arch for arch, _ in reports):
        whole = merged([report for (of, _), report in reports.items() if of == arch])
        failures += failures_of(arch, whole, baseline)
    return failures


def absent(peers: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """A line for each peer that is not here or does not compile."""
    lines = []
    for module in map(importlib.import_module, PEERS):
        if hasattr(module, "version") and not module.is_there():
            lines.append(f"{module.PEER}: absent, {module.version()}")
    for (arch, module), report in peers.items():
        named = getattr(importlib.import_module(module), "PEER", module.rpartition(".")[2])
        lines += [f"{named} at {arch}: {name} failed: {why}" for name, why in report["failed"].items()]
    return lines


def row(arch: str, name: str, metrics: Metrics) -> list[str]:
    """One kernel's cells."""
    return [
        arch,
        name,
        str(metrics.registers),
        str(metrics.spills),
        str(metrics.loop_spills),
        f"{metrics.shared / 1024:.0f}",
        str(metrics.blocks_per_sm),
        str(metrics.loop_instructions),
        ", ".join(f"{name} {count}" for name, count in list(metrics.mix.items())[:MIX]),
        "" if metrics.vec128 is None else f"{metrics.vec128:.2f}",
        "" if metrics.pipe_share is None else f"{metrics.pipe_share:.2f}",
        metrics.bound,
    ]


def _write(path: Path, reports: dict[tuple[str, str], dict[str, Any]]) -> None:
    found: dict[str, Any] = {}
    for (arch, _), report in reports.items():
        found.setdefault(arch, {}).update({name: case["metrics"] for name, case in report["cases"].items()})
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _write_liger(path: Path, peers: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = {arch: report for (arch, module), report in peers.items() if module == liger_peers.__name__}
    path.write_text(liger_peers.document(found), encoding="utf-8")
