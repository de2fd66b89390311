"""What a compiled kernel must satisfy: absolute gates for every target, and no step back from the committed record.

Both return sentences, one per violation, so that a test can print all of them at once.

The record, baseline.json:
    triton      the version that compiled it; under another version only the absolute gates apply
    cases       {arch: {case: {metric: value}}}
    exceptions  {arch: {case: {"why": reason, gate: granted value}}}, written by hand, kept by --update;
                `case` may be a pattern as in a shell, "lora_down-*-skinny"; a later one overrides an earlier one
Gates that a case's own `limits`, or an exception, may set: see GATES.
"""

import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.aot.metrics import Metrics
from tests.tolerance import STATIC_SHARE_SLACK

BASELINE = Path(__file__).with_name("baseline.json")
ABANDONED_REGISTERS = 32  # ptxas reports this beside thousands of spills when it gives up on a kernel

# name: value that every case gets. The first half are upper bounds, the others lower.
GATES = {
    "spills": 0,  # spill instructions in the whole kernel
    "loop_spills": 0,  # spill instructions in the main loop
    "redundancy": 1.0,  # multiply-adds executed over those in the source
    "loop_instructions": math.inf,  # of one turn of the main loop
    "instructions_per_element": math.inf,  # lane-instructions of one turn over the elements it consumes
    "vec128": 0.8,  # share of the main loop's global bytes in loads of 16 bytes per thread
    "bytes_in_flight": 0,  # of the streamed tensor, per processor
    "pipe_share": 0.0,  # tensor cycles over the busiest pipe's, per loop turn
}


@dataclass(frozen=True)
class Record:
    """The metrics that the baseline keeps: the first four must not grow, the shares must not shrink."""

    registers: int
    loop_instructions: int
    instructions: int
    shared: int
    vec128: float | None
    pipe_share: float | None

    @classmethod
    def of(cls, metrics: Metrics) -> "Record":
        def rounded(share):
            return None if share is None else round(share, 3)

        return cls(
            metrics.registers,
            metrics.loop_instructions,
            metrics.instructions,
            metrics.shared,
            rounded(metrics.vec128),
            rounded(metrics.pipe_share),
        )


def absolute_failures(metrics: Metrics, limits: Mapping[str, float]) -> list[str]:
    """The gates that need no record. `limits` replaces values of GATES for this case."""
    unknown = set(limits) - set(GATES)
    if unknown:
        raise ValueError(f"limits: expected names among {sorted(GATES)}, got {sorted(unknown)}")
    gate = {**GATES, **limits}
    failures = []
    if metrics.spills > gate["spills"]:
        gave_up = " (ptxas gave up)" if metrics.registers == ABANDONED_REGISTERS else ""
        failures.append(f"{metrics.spills} spill instructions > {gate['spills']}{gave_up}")
    if metrics.loop_spills > gate["loop_spills"]:
        failures.append(f"{metrics.loop_spills} spill instructions in the main loop > {gate['loop_spills']}")
    if metrics.stack and not gate["spills"]:
        failures.append(f"{metrics.stack} bytes of local memory per thread > 0")
    if metrics.shared > metrics.shared_limit:
        failures.append(f"{metrics.shared} bytes of shared memory > {metrics.shared_limit}")
    if metrics.blocks_per_sm < 1:
        failures.append(f"no block fits on a processor, limited by {metrics.limiter}")
    if metrics.vec128 is not None and metrics.vec128 < gate["vec128"]:
        failures.append(f"{metrics.vec128:.2f} of the main loop's global bytes in 16-byte loads < {gate['vec128']}")
    if metrics.loop_instructions > gate["loop_instructions"]:
        failures.append(f"{metrics.loop_instructions} instructions per loop turn > {gate['loop_instructions']}")
    per_element, in_flight = metrics.instructions_per_element, metrics.bytes_in_flight
    if per_element is not None and per_element > gate["instructions_per_element"]:
        failures.append(f"{per_element:.2f} instructions per element > {gate['instructions_per_element']}")
    if in_flight is not None and in_flight < gate["bytes_in_flight"]:
        failures.append(f"{in_flight} bytes in flight per processor < {gate['bytes_in_flight']}")
    if metrics.redundancy is not None and metrics.redundancy > gate["redundancy"] + STATIC_SHARE_SLACK:
        failures.append(f"the main loop multiplies {metrics.redundancy:.2f} x what its source asks")
    if metrics.pipe_share is not None and metrics.pipe_share < gate["pipe_share"]:
        failures.append(f"pipe share {metrics.pipe_share:.2f} < {gate['pipe_share']}: {metrics.cycles}")
    if metrics.atomics:
        failures.append(f"atomics {metrics.atomics}")
    failures += _tensor_op_failures(metrics)
    return failures


def _tensor_op_failures(metrics: Metrics) -> list[str]:
    """Matrix products must run on the tensor-core instruction that the target has for them."""
    expected, found = metrics.expected_tensor_ops, metrics.tensor_ops
    missing = [name for name, required in expected.items() if required and name not in found]
    strange = [name for name in found if name not in expected]
    if missing or strange:
        return [f"expected tensor instructions {sorted(expected)}, got {found}"]
    return []


def baseline_failures(metrics: Metrics, recorded: Mapping[str, float | None] | None) -> list[str]:
    """Where metrics are worse than `recorded`, the case's entry; None: the case has none."""
    if recorded is None:
        return ["no entry in baseline.json; run python -m tests.aot.compile --update"]
    failures = []
    for name, value in vars(Record.of(metrics)).items():
        before = recorded[name]
        if value is None or before is None:
            continue
        if name in ("vec128", "pipe_share"):
            if value < before - STATIC_SHARE_SLACK:
                failures.append(f"{name} {value} < {before} in the baseline")
        elif value > before:
            failures.append(f"{name} {value} > {before} in the baseline")
    return failures


def failures_of(arch: str, report: Mapping, baseline: Mapping) -> list[str]:
    """All violations at one target; report: as compile.measure_all returns it."""
    same_compiler = baseline["triton"] == report["triton"]
    recorded = baseline["cases"].get(arch, {})
    exceptions = baseline["exceptions"].get(arch, {})
    failures = []
    for name, case in report["cases"].items():
        metrics = Metrics(**case["metrics"])
        found = absolute_failures(metrics, {**case["limits"], **_granted(name, exceptions)})
        if case["tile_fma"] and metrics.source_fma % case["tile_fma"]:
            found.append(f"the loop multiplies {metrics.source_fma} times, expected a multiple of {case['tile_fma']}")
        if same_compiler:
            found += baseline_failures(metrics, recorded.get(name))
        failures += [f"{arch} {name}: {failure}" for failure in found]
    unused = [pattern for pattern in exceptions if not fnmatch.filter(report["names"], pattern)]
    failures += [f"{arch} {pattern}: an exception for no case" for pattern in unused]
    if same_compiler:
        failures += [f"{arch} {name}: in the baseline, but gone" for name in recorded if name not in report["names"]]
    return failures


def _granted(name: str, exceptions: Mapping[str, Mapping]) -> dict[str, float]:
    granted = {}
    for pattern, exception in exceptions.items():
        if fnmatch.fnmatchcase(name, pattern):
            granted |= {gate: value for gate, value in exception.items() if gate != "why"}
    return granted


def updated(baseline: Mapping, arch: str, report: Mapping) -> dict:
    """The baseline with one target's records replaced; the others are dropped if another compiler made them."""
    kept = baseline["cases"] if baseline["triton"] == report["triton"] else {}
    records = {name: vars(Record.of(Metrics(**case["metrics"]))) for name, case in report["cases"].items()}
    return {"triton": report["triton"], "cases": {**kept, arch: records}, "exceptions": baseline["exceptions"]}


def read_baseline(path: Path = BASELINE) -> dict:
    """The committed record; an empty one if there is none yet."""
    if not path.exists():
        return {"triton": "", "cases": {}, "exceptions": {}}
    return json.loads(path.read_text())


def write_baseline(baseline: Mapping, path: Path = BASELINE) -> None:
    """Write the record, one line per case."""
    lines = [f'{{"triton": {json.dumps(baseline["triton"])}']
    for part in ("cases", "exceptions"):
        by_arch = []
        for arch, cases in sorted(baseline[part].items()):
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(cases.items()))
            by_arch.append(f"  {json.dumps(arch)}: {{\n{rows}\n  }}" if rows else f"  {json.dumps(arch)}: {{}}")
        lines.append(f'"{part}": {{\n' + ",\n".join(by_arch) + "\n}")
    path.write_text(",\n".join(lines) + "}\n")
