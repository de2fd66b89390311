"""Compile every kernel as it ships for targets that this machine need not have, and print what came out.

    python -m tests.aot.compile                    a table for all targets
    python -m tests.aot.compile --arch sm_90       one target; --json prints what test_compile.py reads
    python -m tests.aot.compile --update           write tests/aot/baseline.json

Must run without TRITON_INTERPRET: then kernels are Python functions and cannot be compiled.
"""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
WAVES = {"gfx942": 64, "gfx1100": 32}  # lanes per warp of AMD's targets
SHIPPED = (
    "fastpeft.kernels.aot_cases",
    "fastpeft.kernels.aot_nf4",
    "fastpeft.kernels.aot_dora",
    "fastpeft.kernels.aot_rope",
    "fastpeft.kernels.aot_attention",
    "fastpeft.kernels.aot_norm",
    "fastpeft.kernels.aot_glu",
    "fastpeft.kernels.aot_cross_entropy",
)
DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


def compiled(case, arch: str):
    """An AotCase compiled for `arch`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", arch, WAVES[arch])
    attrs = {(index,): DIVISIBLE_BY_16 for index in case.divisible}
    source = ASTSource(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=target, options=options)


def measured(cases: Sequence, kernels: Sequence, arch: str) -> list:
    """Metrics of AotCases and what `compiled` made of them."""
    from tests.aot import amdgcn, sass
    from tests.aot.metrics import dots_of

    reader, found = sass if arch.startswith("sm_") else amdgcn, []
    for case, kernel, listing in zip(cases, kernels, reader.disassemble(kernels), strict=True):
        metrics = reader.measure(kernel, listing, arch, case.num_warps, dots_of(kernel.asm["ttir"]), case.tile_fma)
        own = {"stages": case.num_stages, "elements": case.elements, "stage_bytes": case.stage_bytes}
        found.append(dataclasses.replace(metrics, **own))
    return found


def measure_case(case, arch: str):
    """Compile one AotCase for `arch`; its Metrics."""
    return measured([case], [compiled(case, arch)], arch)[0]


def measure_all(arch: str, modules: Sequence[str] = SHIPPED, keep_going: bool = False) -> dict:
    """Measure the cases of `modules` at one target.

    Returns {"triton": version, "names": of all cases, "cases": {name: {"metrics", "tile_fma", "limits"}}, "failed": {name: why}},
    the last for cases that do not compile, which end it without keep_going.
    """
    import triton
    from triton.errors import TritonError

    cases = [case for module in modules for case in importlib.import_module(module).aot_cases(arch)]
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"aot_cases({arch!r}): expected unique names, got {names}")
    kernels, failed = {}, {}
    for case in cases:
        print(f"{arch} {case.name}", file=sys.stderr)  # the last one printed is the one that does not compile
        try:
            kernels[case.name] = compiled(case, arch)
        except (TritonError, RuntimeError) as error:
            if not keep_going:
                raise
            failed[case.name] = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    cases = [case for case in cases if case.name in kernels]
    found = {
        case.name: {"metrics": dataclasses.asdict(metrics), "tile_fma": case.tile_fma, "limits": dict(case.limits)}
        for case, metrics in zip(cases, measured(cases, list(kernels.values()), arch), strict=True)
    }
    return {"triton": triton.__version__, "names": names, "cases": found, "failed": failed}


def merged(reports: Sequence[dict]) -> dict:
    """One report of several at one target."""
    names = [name for report in reports for name in report["names"]]
    if len(set(names)) < len(names):
        raise ValueError(f"aot_cases: expected unique names, got {names}")
    cases, failed = (
        {name: v for report in reports for name, v in report[part].items()} for part in ("cases", "failed")
    )
    return {"triton": reports[0]["triton"], "names": names, "cases": cases, "failed": failed}


def measure_in_subprocess(arch: str, modules: Sequence[str] = SHIPPED) -> dict:
    """`measure_all` in a process in which kernels can be compiled."""
    return merged(list(reports_in_subprocess(arch, modules).values()))


def reports_in_subprocess(arch: str, modules: Sequence[str], keep_going: bool = False) -> dict[str, dict]:
    """{module: `measure_all` of it} of one process in which kernels can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot.compile", "--json", "--arch", arch, "--cases", ",".join(modules)]
    command += ["--keep-going"] if keep_going else []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, metrics) -> str:
    """One line of the table."""

    def share(value):
        return "   -" if value is None else f"{value:4.2f}"

    def kib(value):
        return "  -" if value is None else f"{value / 1024:3.0f}"

    busiest = max(metrics.cycles, key=metrics.cycles.get)
    return (
        f"{metrics.arch:7} {name:58} {metrics.registers:4} {metrics.spills:4}/{metrics.loop_spills:<4} "
        f"{metrics.shared / 1024:5.0f} {metrics.blocks_per_sm:3} {metrics.instructions:6} {metrics.loop_instructions:5} "
        f"{share(metrics.vec128)} {share(metrics.redundancy)} {share(metrics.pipe_share)} {busiest:8} "
        f"{share(metrics.instructions_per_element)} {kib(metrics.bytes_in_flight)} "
        f"{' '.join(f'{op} {count}' for op, count in metrics.tensor_ops.items())}"
    )


HEAD = (
    f"{'target':7} {'case':58} {'regs':>4} {'spills':>4}/loop {'KiB':>5} {'blk':>3} {'code':>6} {'loop':>5} "
    f"{'v128':>4} {'redu':>4} {'p':>4} {'busiest':8} {'i/el':>4} fly"
)


def main() -> int:
    """Command line; the exit code is 1 if a gate fails."""
    parser = argparse.ArgumentParser(description="ahead-of-time metrics of every kernel", allow_abbrev=False)
    parser.add_argument("--arch", action="append", choices=ARCHS, help="target; may be repeated; all by default")
    parser.add_argument("--cases", default=",".join(SHIPPED), help="modules with aot_cases(arch), separated by commas")
    parser.add_argument("--json", action="store_true", help="print one JSON line for one target: a report by module")
    parser.add_argument("--keep-going", action="store_true", help="with --json: note cases that do not compile, go on")
    parser.add_argument("--update", action="store_true", help="write baseline.json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("expected no TRITON_INTERPRET in the environment; unset it")

    from tests.aot.gates import failures_of, read_baseline, updated, write_baseline
    from tests.aot.metrics import Metrics

    modules = options.cases.split(",")
    if options.update and modules != list(SHIPPED):
        parser.error(f"--update: expected the shipped cases, got {options.cases}; leave --cases out")
    if options.json:
        (arch,) = options.arch
        print(json.dumps({module: measure_all(arch, [module], options.keep_going) for module in modules}))
        return 0
    reports = {arch: measure_all(arch, modules) for arch in options.arch or ARCHS}
    print(HEAD)
    for report in reports.values():
        for name, case in report["cases"].items():
            print(row(name, Metrics(**case["metrics"])))
    baseline = read_baseline()
    if options.update:
        for arch, report in reports.items():
            baseline = updated(baseline, arch, report)
        write_baseline(baseline)
    if modules != list(SHIPPED):
        baseline["cases"] = {}  # other cases than the record's: absolute gates only
        baseline["triton"] = ""
    failures = [failure for arch, report in reports.items() for failure in failures_of(arch, report, baseline)]
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
