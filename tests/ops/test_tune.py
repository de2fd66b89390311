"""`fastpeft tune`: what is measured, what is kept, and that a table changes what runs."""

import json

import pytest
import torch

from fastpeft.ops import algorithms, tune, tune_table
from fastpeft.ops.lora import lora_linear

CPU = torch.device("cpu")
F32 = torch.float32


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPEFT_TUNE_DIR", str(tmp_path))
    tune_table._read.cache_clear()
    algorithms.forget_choices()
    yield
    tune_table._read.cache_clear()
    algorithms.forget_choices()


def wanted(*rows):
    return tune.problems([(24, 20)], rows, CPU, r=3, dtype=F32)


def test_a_cpu_is_asked_for_steps_and_a_gpu_for_products():
    assert [p.of for p in wanted(4, 8)] == ["step", "step"]
    gpu = tune.problems([(24, 20), (24, 20)], [8], torch.device("cuda"), r=3, dtype=F32, base="nf4", dropout=True)
    assert [(p.of, p.base, p.dropout) for p in gpu] == [("y", "nf4", True), ("dx", "nf4", True)]
    assert tune.problems([(24, 20)], [8], CPU, r=3, dtype=F32, base="nf4") == []


def test_measuring_runs_the_candidates_for_real():
    table = tune.tune(wanted(4, 40), CPU)
    (by_rows,) = table.values()
    assert set(by_rows) == {"4", "40"}
    assert all(set(times) == {"function", "composed"} for times in by_rows.values())
    assert all(seconds >= 0 for times in by_rows.values() for seconds in times.values())
    assert tune_table.read_table(CPU) == table


@pytest.mark.watched
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_kernels_are_measured_by_the_same_code(base, device, monkeypatch):
    """Their times in the interpreter mean nothing; that every candidate of y and dx runs does."""
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "ROUNDS_BEFORE", 0)
    for dropout in (False, True):
        for of in ("y", "dx"):
            problem = algorithms.Problem(of, base, 5, 64, 64, 3, torch.bfloat16, dropout)
            seconds = tune.measure_problem(problem, device)
            assert set(seconds) == set(algorithms.candidates(problem, in_loop=base == "nf4"))


def test_a_tuned_table_decides(monkeypatch):
    from fastpeft.ops import lora

    problem = wanted(32)[0]
    called = []
    monkeypatch.setattr(lora.LoRALinear, "apply", lambda *inputs: called.append("function"))
    monkeypatch.setattr(lora, "_composed", lambda *inputs: called.append("composed"))
    inputs = [torch.randn(32, 20), torch.randn(24, 20), torch.randn(3, 20), torch.randn(24, 3)]
    for best, other in (("function", "composed"), ("composed", "function")):
        tune.tune([problem], CPU, again=True, measure=lambda *_, best=best, other=other: {best: 1.0, other: 2.0})
        lora_linear(*inputs)
    assert called == ["function", "composed"]


def test_what_was_measured_is_not_measured_again():
    counted = []

    def measure(problem, device):
        counted.append(problem.m)
        return {"function": 1.0, "composed": 2.0}

    tune.tune(wanted(4, 8), CPU, measure=measure)
    tune.tune(wanted(4, 8, 16), CPU, measure=measure)
    assert counted == [4, 8, 16]
    tune.tune(wanted(4), CPU, measure=measure, again=True)
    assert counted == [4, 8, 16, 4]


def test_an_interrupted_run_keeps_what_it_measured():
    def measure(problem, device):
        if problem.m == 8:
            raise KeyboardInterrupt
        return {"function": 1.0, "composed": 2.0}

    with pytest.raises(KeyboardInterrupt):
        tune.tune(wanted(4, 8, 16), CPU, measure=measure)
    (by_rows,) = tune_table.read_table(CPU).values()
    assert set(by_rows) == {"4"}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"seconds": {"k": {"8": {}}}}', '{"seconds": {"k": {"8": {"addmm": "x"}}}}']
)
def test_a_table_that_cannot_be_read_is_named_and_not_used(text):
    path = tune_table.table_path(CPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="tune again"):
        assert tune_table.read_table(CPU) == {}


def test_the_file_names_versions_and_device():
    path = tune_table.write_table(CPU, {})
    assert torch.__version__ in path.name
    machine = json.loads(path.read_text())["machine"]
    assert machine["torch"] == torch.__version__
    assert {"device", "arch", "triton", "fastpeft", "threads"} <= set(machine)
    assert list(path.parent.iterdir()) == [path]


def test_linear_shapes_of_a_model_on_meta():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.Linear(8, 16))
    assert tune.linear_shapes(model) == [(8, 16), (16, 8)]
