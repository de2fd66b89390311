"""The gates find kernels with a planted fault, and let the one without pass."""

import dataclasses

import pytest

from tests.aot import compile as aot
from tests.aot.gates import (
    Record,
    absolute_failures,
    baseline_failures,
    failures_of,
    read_baseline,
    updated,
    write_baseline,
)
from tests.aot.metrics import Dot, Metrics, dots_of, loop_fma_of, main_loop

GOOD = Metrics(
    arch="sm_90",
    registers=100,
    stack=0,
    spills=0,
    loop_spills=0,
    shared=1024,
    shared_limit=2048,
    blocks_per_sm=2,
    limiter="registers",
    instructions=400,
    loops=1,
    loop_instructions=80,
    loop_fma=2048,
    source_fma=2048,
    tensor_ops={"HGMMA": 4},
    expected_tensor_ops={"HGMMA": True},
    vec128=1.0,
    atomics=[],
    threads=128,
    cycles={"tensor": 100.0, "issue": 50.0},
)

EXPECTED = {
    "none": None,
    "spill": "spill instructions > 0",
    "atomics": "atomics",
    "shared memory": "bytes of shared memory >",
    "narrow loads": "0.00 of the main loop's global bytes",
    "slow tensor cores": "expected tensor instructions ['HGMMA'], got {'HMMA'",
    "repeated work": "x what its source asks",
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_planted_faults_are_found(arch):
    measured = aot.measure_in_subprocess(arch, ["tests.aot.planted"])["cases"]
    for fault, message in EXPECTED.items():
        if arch == "gfx942" and fault == "slow tensor cores":
            continue
        failures = absolute_failures(Metrics(**measured[fault]["metrics"]), {})
        if message is None:
            assert failures == []
        else:
            assert any(message in failure for failure in failures), (fault, failures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "3 spill instructions > 0"),
        ({"spills": 900, "registers": 32}, "ptxas gave up"),
        ({"loop_spills": 1}, "1 spill instructions in the main loop"),
        ({"stack": 16}, "16 bytes of local memory"),
        ({"shared": 4096}, "4096 bytes of shared memory > 2048"),
        ({"blocks_per_sm": 0}, "no block fits"),
        ({"vec128": 0.5}, "0.50 of the main loop's global bytes"),
        ({"loop_fma": 4096}, "2.00 x what its source asks"),
        ({"tensor_ops": {}}, "expected tensor instructions"),
        ({"tensor_ops": {"HGMMA": 4, "HMMA": 1}}, "expected tensor instructions"),
        ({"atomics": ["RED.E.ADD"]}, "atomics ['RED.E.ADD']"),
    ],
)
def test_each_absolute_gate(change, message):
    assert absolute_failures(GOOD, {}) == []
    (failure,) = absolute_failures(dataclasses.replace(GOOD, **change), {})
    assert message in failure


def test_limits_replace_gates():
    assert "pipe share 1.00 < 1.5" in absolute_failures(GOOD, {"pipe_share": 1.5})[0]
    assert absolute_failures(dataclasses.replace(GOOD, vec128=0.5), {"vec128": 0.4}) == []
    assert "80 instructions per loop turn > 79" in absolute_failures(GOOD, {"loop_instructions": 79})[0]
    with pytest.raises(ValueError, match="expected names among"):
        absolute_failures(GOOD, {"speed": 1})


def test_one_pass_kernels_are_held_to_instructions_and_bytes():
    """80 instructions of 128 threads for 4096 elements; two stages ahead of 8 KiB in two blocks are 32 KiB."""
    streaming = dataclasses.replace(GOOD, stages=3, elements=4096, stage_bytes=8192)
    assert streaming.instructions_per_element == 2.5
    assert streaming.bytes_in_flight == 32768
    assert absolute_failures(streaming, {"instructions_per_element": 2.5, "bytes_in_flight": 32768}) == []
    limits = {"instructions_per_element": 2.4, "bytes_in_flight": 36864}
    assert absolute_failures(streaming, limits) == [
        "2.50 instructions per element > 2.4",
        "32768 bytes in flight per processor < 36864",
    ]
    assert absolute_failures(GOOD, limits) == []


@pytest.mark.parametrize(
    "change",
    [
        {"registers": 101},
        {"loop_instructions": 81},
        {"instructions": 401},
        {"shared": 1025},
        {"vec128": 0.9},
        {"cycles": {"tensor": 50.0, "issue": 100.0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_step_back_from_the_baseline_is_found(change):
    recorded = vars(Record.of(GOOD))
    assert baseline_failures(GOOD, recorded) == []
    (failure,) = baseline_failures(dataclasses.replace(GOOD, **change), recorded)
    assert "in the baseline" in failure


def report_of(**cases):
    measured = {name: {"metrics": dataclasses.asdict(m), "tile_fma": 1024, "limits": {}} for name, m in cases.items()}
    return {"triton": "3.8.0", "names": list(cases), "cases": measured}


def test_baseline_is_written_read_back_and_applied(tmp_path):
    report = report_of(good=GOOD)
    baseline = updated({"triton": "3.7.0", "cases": {"sm_80": {}}, "exceptions": {}}, "sm_90", report)
    write_baseline(baseline, tmp_path / "baseline.json")
    baseline = read_baseline(tmp_path / "baseline.json")
    assert baseline == {"triton": "3.8.0", "cases": {"sm_90": {"good": vars(Record.of(GOOD))}}, "exceptions": {}}
    assert failures_of("sm_90", report, baseline) == []

    worse = report_of(good=dataclasses.replace(GOOD, registers=101))
    assert failures_of("sm_90", worse, baseline) == ["sm_90 good: registers 101 > 100 in the baseline"]
    assert failures_of("sm_90", worse | {"triton": "3.9.0"}, baseline) == []
    other_work = report_of(good=dataclasses.replace(GOOD, loop_fma=2000, source_fma=2000))
    assert "expected a multiple of 1024" in failures_of("sm_90", other_work, baseline)[0]
    failures = failures_of("sm_90", report_of(renamed=GOOD), baseline)
    assert failures[0].startswith("sm_90 renamed: no entry in baseline.json")
    assert failures[1] == "sm_90 good: in the baseline, but gone"


def test_exceptions_grant_gates_to_the_cases_that_they_name():
    spilling = dataclasses.replace(GOOD, spills=4, stack=8)
    report = report_of(**{"down-r16": spilling, "down-r32": spilling, "up-r16": GOOD})
    exceptions = {"sm_90": {"down-*": {"why": "float32 tiles of this size do", "spills": 4}}}
    baseline = updated({"triton": "", "cases": {}, "exceptions": exceptions}, "sm_90", report)
    assert failures_of("sm_90", report, baseline) == []
    exceptions["sm_90"]["down-r32"] = {"why": "less is possible here", "spills": 3}
    assert failures_of("sm_90", report, baseline) == ["sm_90 down-r32: 4 spill instructions > 3"]
    exceptions["sm_90"]["sideways-*"] = {"why": "gone", "spills": 3}
    assert "sm_90 sideways-*: an exception for no case" in failures_of("sm_90", report, baseline)


def test_no_baseline_file_reads_as_an_empty_one(tmp_path):
    assert read_baseline(tmp_path / "missing.json")["cases"] == {}


def test_dots_are_read_from_the_source():
    ttir = """
      %a = tt.dot %x, %y, %z : tensor<16x32xbf16> * tensor<32x64xbf16> -> tensor<16x64xf32>
      %acc:2 = scf.for %k = %c0 to %K step %c1 iter_args(%b = %z) -> (tensor<128x64xf32>) {
        %b = tt.dot %x, %y, %z, inputPrecision = tf32 : tensor<128x32xf32> * tensor<32x64xf32> -> tensor<128x64xf32>
      }
      %c = tt.dot %x, %y, %z : tensor<8x4xf32> * tensor<4x2xf32> -> tensor<8x2xf32>
    """
    assert dots_of(ttir) == [
        Dot(16, 64, 32, "half", None),
        Dot(128, 64, 32, "tf32", 0),
        Dot(8, 2, 4, "ieee", None),
    ]


def test_main_loop_of_the_source_is_the_one_the_case_names():
    """A rank cut into chunks is a loop of its own; its products were once added to the main loop's."""
    dots = [Dot(64, 64, 16, "half", None), Dot(64, 64, 32, "half", 0), Dot(64, 64, 32, "half", 1)]
    dots.append(dots[-1])
    assert loop_fma_of(dots, None) == 2 * 64 * 64 * 32
    assert loop_fma_of(dots, 64 * 64 * 32) == 64 * 64 * 32
    assert loop_fma_of(dots[:1], 64 * 64 * 16) == 0


@dataclasses.dataclass
class _Step:
    target: int | None = None
    work: int = 0


def _main_loop(code, source_fma=0):
    return main_loop(code, lambda body: sum(step.work for step in body), len, source_fma)


def test_main_loop_is_the_shortest_of_those_with_the_most_work():
    """A masked copy of the same loop is longer: it was taken for the main loop once, and hid a slower one."""
    masked = [_Step(work=1), _Step(), _Step(), _Step(target=0)]
    plain = [_Step(work=1), _Step(target=4)]
    idle = [_Step(), _Step(target=6)]
    assert _main_loop([*masked, *plain, *idle]) == (plain, 3)


def test_main_loop_has_the_work_of_the_source():
    large, small = [_Step(work=2), _Step(target=0)], [_Step(work=1), _Step(target=2)]
    assert _main_loop([*large, *small]) == (large, 2)
    assert _main_loop([*large, *small], source_fma=1) == (small, 2)


def test_main_loop_is_innermost():
    inner = [_Step(work=1), _Step(target=1)]
    assert _main_loop([_Step(work=5), *inner, _Step(target=0)]) == (inner, 1)


def test_without_tensor_work_the_loop_that_loads_most_counts():
    little, much = [_Step(target=None), _Step(target=0)], [_Step(), _Step(), _Step(target=2)]
    assert _main_loop([*little, *much]) == (much, 2)


def test_without_a_loop_the_whole_code_counts():
    assert _main_loop([_Step(), _Step()]) == ([_Step(), _Step()], 0)
