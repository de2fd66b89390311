"""The benchmark suite's own rules: a peer never stops a run, a wrong result has no speed-up, a slower commit is found."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, plots, report, tables, traffic
from benchmarks.case import Absent, Op, Work, described
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.ops import ops
from benchmarks.roofline import Roofline
from benchmarks.running import run_case
from benchmarks.timing import Times, interleaved, order, ratio

CPU = torch.device("cpu")
TOP = Roofline(1e10, {"float32": 1e11, "bfloat16": 2e11})


@dataclass(frozen=True)
class Square:
    """y = x^2 of m numbers."""

    m: int = 512
    dtype: str = "float32"
    backward: bool = True

    def __str__(self) -> str:
        return f"M{self.m}"

    def flops(self) -> float:
        return 3.0 * self.m

    def bytes(self) -> float:
        return 16.0 * self.m


def draw(case, device):
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(x=torch.randn(case.m, generator=generator).requires_grad_(case.backward))


def work(function):
    return lambda given: Work(lambda: function(given.x), [given.x])


def absent(given):
    raise Absent("not here")


def exact(given, dy):
    x = given.x.detach().double()
    return [x**2, 2 * x * dy.double()]


def square_op(**providers):
    every = {"theirs": work(lambda x: x * x), "fastpeft": work(lambda x: x**2), **providers}
    return Op("square", "Square", (Square(),), (Square(),), "theirs", draw, every, exact)


def run(op, case=Square()):
    return run_case(op, case, CPU, TOP, seconds=0.01)


def record_of(*rows):
    return {
        "machine": {"cpu": "a CPU", "isa": "avx2", "cores": 2, "commit": "abc", "versions": {"torch": "2"}},
        "roofline": TOP.to_dict(),
        "seconds": 1.0,
        "ops": {"square": "Square"},
        "rows": list(rows),
        "left_out": [],
    }


def test_a_peer_that_is_absent_or_fails_never_stops_the_run():
    row = run(
        square_op(missing=absent, broken=work(lambda x: x @ torch.ones(3)), late=work(lambda x: x.sum().reshape(1)))
    )
    found = row["providers"]
    assert found["missing"] == {"absent": "not here"}
    assert found["broken"]["failed"].startswith("RuntimeError")
    assert "failed" in found["late"]  # its result has another shape than the answer
    assert {"cpu_us", "error", "saved_bytes", "peak_bytes", "roofline_percent"} <= found["fastpeft"].keys()
    text = tables.op_table(record_of(row), "square", absent=True)
    assert "absent: not here" in text
    assert "failed: RuntimeError" in text


def test_a_wrong_result_has_no_speedup():
    row = run(square_op(fastpeft=work(lambda x: 1.001 * x * x)))
    ours = row["providers"]["fastpeft"]
    assert not ours["correct"]
    assert ours["error"] == pytest.approx(1e-3, rel=0.1)
    assert "wrong result" in tables.summary_table(record_of(row), "square")
    right = run(square_op())["providers"]["fastpeft"]
    assert right["correct"]
    assert tables.speedup(right, "cpu") == f"{right['cpu_speedup']:.2f}"


def test_a_floor_is_timed_and_not_compared():
    op = replace(square_op(floor=work(lambda x: x + 0)), floor="floor")
    floor = run(op)["providers"]["floor"]
    assert "cpu_us" in floor
    assert "error" not in floor
    assert "cpu_speedup" not in floor


def test_memory_is_counted_beside_what_exists_anyway():
    x = torch.randn(1 << 16, requires_grad=True)
    plain = Work(lambda: (x * x).exp(), [x])
    assert saved_bytes(plain) == 4 << 16  # exp keeps its result; x is exempt
    peak = peak_bytes(plain, torch.ones(1 << 16), CPU)
    assert 2 * (4 << 16) <= peak <= 5 * (4 << 16)


def test_rounds_are_interleaved_and_ratios_are_of_rounds():
    calls = []
    clocks = iter(range(1, 1000))
    times = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        0.0,
        lambda step, n: next(clocks),
        lambda: None,
    )
    assert {len(one.samples) for one in times.values()} == {7}
    assert [order(["a", "b", "c"], number) for number in range(4)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["b", "c", "a"],
        ["a", "c", "b"],
    ]
    assert ratio(Times((2.0, 4.0, 6.0)), Times((1.0, 2.0, 30.0))) == 2.0


def changed(record, factor):
    text = json.loads(json.dumps(record))
    for row in text["rows"]:
        ours = row["providers"]["fastpeft"]
        ours["cpu_us"] = [value * factor for value in ours["cpu_us"]]
    return text


def test_compare_finds_what_became_slower_over_the_baseline(tmp_path, capsys):
    before = record_of(run(square_op()))
    slower = changed(before, 1.5)
    assert compare.report(before, before)[1] == 0
    text, count = compare.report(before, slower)
    assert count == 1
    assert "1.50" in text
    busy = json.loads(json.dumps(slower))  # all of it slower: the machine
    for one in busy["rows"][0]["providers"].values():
        one["cpu_us"] = [value * 2 for value in one["cpu_us"]]
    assert compare.changes(slower, busy)[0]["ratio"] == pytest.approx(1.0)
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, record in zip(paths, (before, slower)):
        path.write_text(json.dumps(record))
    assert command.main(["compare", *map(str, paths)]) == 1
    paths[0].write_text("{}")
    assert command.main(["compare", *map(str, paths)]) == 2
    assert "without rows" in capsys.readouterr().err


def test_two_runs_of_the_same_code_are_held_to_a_bound(tmp_path, capsys):
    before = record_of(run(square_op()))
    ours = before["rows"][0]["providers"]["fastpeft"]
    ours["cpu_speedup"] = 2.0
    after = json.loads(json.dumps(before))
    after["rows"][0]["providers"]["fastpeft"]["cpu_speedup"] = 1.6
    ((change, name),) = compare.spread(before, after)
    assert change == pytest.approx(0.25)
    assert name == "square/M512/fastpeft"
    assert compare.spread(before, after, rows=513) == []
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, record in zip(paths, (before, after)):
        path.write_text(json.dumps(record))
    assert command.main(["compare", *map(str, paths), "--within", "10%"]) == 1
    assert "1 ratios at M >= 256, 1 changed by more than 10%" in capsys.readouterr().out
    assert command.main(["compare", *map(str, paths), "--within", "0.3"]) == 0


def test_the_plot_of_memory_has_its_cases():
    """The committed results once had no two lengths of one kind."""
    op = ops()["attention"]
    sizes = [described(case) for case in op.cases]
    rows = [
        {"op": "attention", "sizes": one, "providers": {"fastpeft": {"cpu_us": [1.0] * 3, "peak_bytes": 1 << 20}}}
        for one in sizes
    ]
    pytest.importorskip("matplotlib")
    figure = plots.memory_over_tokens({"machine": {}, "rows": rows})
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [512, 1024, 2048, 4096]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--op", "nope"], "lora"),
        (["run", "--provider", "nope"], "peft"),
        (["end-to-end", "--only", "nope"], "qlora_nf4_bf16"),
        (["compare", "a", "b", "--within", "-3%"], "within"),
        (["static", "--arch", "sm_1"], "sm_90"),
        (["nope"], "compare"),
    ],
)
def test_wrong_arguments_list_what_exists(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_an_unknown_case_lists_the_cases(capsys):
    assert command.main(["run", "--quick", "--op", "lora", "--case", "nope"]) == 2
    assert "lora/SmolLM2-135M q M1024" in capsys.readouterr().err


def test_report_writes_tables_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    record = record_of(run(square_op(missing=absent)))
    written = {path.name for path in report.write(record, tmp_path)}
    assert written == {"report.md", "roofline.svg", "roofline.png"}
    text = (tmp_path / "report.md").read_text()
    assert "a CPU (avx2), 2 cores" in text
    assert "Absent: missing (not here)." in text


@pytest.mark.parametrize("name", list(ops()))
def test_every_provider_of_an_op_gives_its_answer(name):
    """The smallest quick case of every op, through the whole suite: each provider is right, or says why it is absent."""
    op = ops()[name]
    case = min(op.quick, key=lambda one: one.flops() + one.bytes())
    row = run_case(op, case, CPU, TOP, seconds=0.0, quick=True)
    for provider, one in row["providers"].items():
        assert "failed" not in one, (provider, one)
        assert one.get("correct", True), (provider, one)
    assert "fastpeft" in row["providers"]
    assert row["providers"]["fastpeft"].get("correct"), row["providers"]["fastpeft"]


@pytest.mark.parametrize("name", list(ops()))
def test_cases_are_named_apart(name):
    cases = [str(case) for case in (*ops()[name].cases, *ops()[name].quick)]
    assert len(set(cases)) == len(dict.fromkeys((*ops()[name].cases, *ops()[name].quick)))


def test_traffic_counts_every_op_s_bytes():
    rows = [line.strip("| ").split(" | ") for line in traffic.table().splitlines()[2:]]
    assert {op for op, *_ in rows} == {name for name, _ in traffic.steps()}
    glu, grad = (row for row in rows if row[0] == "SwiGLU")
    tensor = 128 * 256 * 2 // 1024
    assert glu == ["SwiGLU", "glu", f"{3 * tensor} kB", "1.00", "1.00"]  # gate, up, h
    assert grad == ["SwiGLU", "glu_grad", f"{5 * tensor} kB", "1.00", "1.00"]  # dh, gate, up, dgate, dup


def test_freed_memory_is_not_mapped_anew():
    """In a process of its own: the setting stays."""
    found = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True).stdout
    handed_back, kept = map(int, found.split())
    assert kept < handed_back / 10


_FAULTS = """
import resource, torch
from benchmarks.timing import keep_freed_memory
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
big = [torch.zeros(16 << 20) for _ in range(2)]
del big
first = faults()
keep_freed_memory()
torch.zeros(1 << 20)
print(first, faults())
"""
