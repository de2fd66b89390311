"""What the compiler makes of the kernels, without a GPU: every kernel x configuration x target.

    python -m benchmarks static [--arch sm_90 ...] [--kernel TEXT ...] [--check] [--traffic] [--peers] [--json FILE]

Compiling goes on one process a core and is kept on disk by what it depends on (the kernels, their launchers, the compiler), so a
second run prints at once. --check holds the metrics to tests/aot/baseline.json and the gates, as the tests do. --traffic adds the
bytes that launches ask for in Triton's interpreter over the compulsory ones. --peers compiles the Triton tutorials' product and
attention in the same run, for the targets that they have tiles for.

Registers, spills, shared memory and instruction counts are exact for this compiler. The predicted bound is the busiest pipe of
one turn of the main loop at its issue rate: latency, caches and clocks are not in it.
"""

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown
from fastpeft.backend import tune_folder
from tests.aot.compile import ARCHS, SHIPPED, measure_in_subprocess
from tests.aot.gates import failures_of, read_baseline
from tests.aot.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("tests.aot.peers", "tests.aot.attention_peers")
HEAD = (
    "target",
    "kernel",
    "registers",
    "spills",
    "in loop",
    "shared KiB",
    "blocks/SM",
    "loop",
    "16-byte loads",
    "tensor share",
    "bound",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS), metavar="ARCH", help=", ".join(ARCHS))
    parser.add_argument("--kernel", nargs="+", metavar="TEXT", help="kernels whose name holds one of these")
    parser.add_argument("--check", action="store_true", help="hold the metrics to the gates and the committed baseline")
    parser.add_argument("--traffic", action="store_true", help="bytes in the interpreter over the compulsory ones")
    parser.add_argument("--peers", action="store_true", help="compile the Triton tutorials' kernels too")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile at once")


def static(options: argparse.Namespace) -> int:
    """Print the table; 1 if --check finds a failure."""
    modules = [*SHIPPED, *(PEERS if options.peers else ())]
    reports = measured(options.arch, modules, options.jobs)
    chosen = [
        (arch, name, Metrics(**case["metrics"]))
        for (arch, _), report in reports.items()
        for name, case in report["cases"].items()
        if options.kernel is None or any(text in name for text in options.kernel)
    ]
    if not chosen:
        names = sorted({name for report in reports.values() for name in report["cases"]})
        raise ValueError(f"static: no kernel's name holds any of {options.kernel}; there are {', '.join(names)}")
    print(markdown(HEAD, [row(arch, name, metrics) for arch, name, metrics in chosen]))
    if options.traffic:
        from benchmarks.traffic import table

        print("\n" + table())
    if options.json:
        _write(options.json, reports)
    if not options.check:
        return 0
    failures = checked({key: report for key, report in reports.items() if key[1] in SHIPPED})
    print("\n".join(failures) if failures else "every gate holds")
    return 1 if failures else 0


def measured(archs, modules, jobs: int) -> dict[tuple[str, str], dict[str, Any]]:
    """{(arch, module): report as tests.aot.compile.measure_all}, from disk where nothing that it depends on has changed."""
    wanted = [(arch, module) for arch in archs for module in modules if _is_for(module, arch)]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        reports = list(pool.map(lambda one: _measured(*one), wanted))
    return dict(zip(wanted, reports, strict=True))


def _is_for(module: str, arch: str) -> bool:
    """Peers are compiled for some targets only."""
    return module not in PEERS or arch in importlib.import_module(module).ARCHS


def _measured(arch: str, module: str) -> dict[str, Any]:
    path = cache_folder() / f"{arch}-{module}-{_mark()}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    print(f"compiling {module.rpartition('.')[2]} for {arch}", file=sys.stderr, flush=True)
    report = measure_in_subprocess(arch, [module])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(report), encoding="utf-8")
    unfinished.replace(path)
    return report


def cache_folder() -> Path:
    """Where compiled metrics are kept: beside the tables of `fastpeft tune`."""
    return tune_folder().parent / "static"


def _mark() -> str:
    """A digest of all that the metrics depend on."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(
        [
            *(ROOT / "kernels").glob("*.py"),
            *(ROOT / "tests" / "aot").glob("*.py"),
        ]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def checked(reports: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Violations of the gates and of the baseline, over whole targets."""
    baseline, failures = read_baseline(), []
    for arch in dict.fromkeys(arch for arch, _ in reports):
        parts = [report for (of, _), report in reports.items() if of == arch]
        whole = {
            "triton": parts[0]["triton"],
            "names": [name for part in parts for name in part["names"]],
            "cases": {name: case for part in parts for name, case in part["cases"].items()},
        }
        failures += failures_of(arch, whole, baseline)
    return failures


def row(arch: str, name: str, metrics: Metrics) -> list[str]:
    """One kernel's cells."""
    busiest = max(metrics.cycles, key=metrics.cycles.get) if metrics.cycles else ""
    return [
        arch,
        name,
        str(metrics.registers),
        str(metrics.spills),
        str(metrics.loop_spills),
        f"{metrics.shared / 1024:.0f}",
        str(metrics.blocks_per_sm),
        str(metrics.loop_instructions),
        "" if metrics.vec128 is None else f"{metrics.vec128:.2f}",
        "" if metrics.pipe_share is None else f"{metrics.pipe_share:.2f}",
        busiest if metrics.loop_fma else "memory",
    ]


def _write(path: Path, reports: dict[tuple[str, str], dict[str, Any]]) -> None:
    found: dict[str, Any] = {}
    for (arch, _), report in reports.items():
        found.setdefault(arch, {}).update({name: case["metrics"] for name, case in report["cases"].items()})
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
