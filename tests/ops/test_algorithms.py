"""The choice of algorithms: candidates, the roofline model, measured tables."""

import dataclasses

import pytest
import torch

from fastpeft.ops.algorithms import (
    ALGORITHMS,
    Problem,
    algorithm_for,
    candidates,
    choose_algorithm,
    composed_is_faster,
    machine_of,
    nearest,
    predicted_seconds,
)

BF16 = torch.bfloat16
H100 = machine_of("sm_90", 132, 1.83e9, 3.35e12, 50 * 2**20)
A100 = machine_of("sm_80", 108, 1.41e9, 2.0e12, 40 * 2**20)
UNKNOWN = machine_of("sm_999", 20, 0.0, 0.0, 0.0)
MACHINES = {"H100": H100, "A100": A100, "unknown": UNKNOWN}


def problem(m, **changes):
    return dataclasses.replace(Problem("y", "dense", m, 4096, 4096, 16, BF16), **changes)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("base", ["dense", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("of", ["y", "dx"])
@pytest.mark.parametrize("dropout", [False, True])
def test_every_problem_has_a_choice_that_can_run(of, base, dropout, machine):
    for m in (1, 7, 64, 4096, 10**6):
        asked = problem(m, of=of, base=base, dropout=dropout)
        names = candidates(asked, in_loop=base in ("nf4", "fp4"))
        assert choose_algorithm(asked, names, machine) in names
        assert all(0 < predicted_seconds(asked, name, machine) < 60 for name in names)


def test_candidates_follow_what_the_algorithms_can():
    assert candidates(problem(64), in_loop=False) == ("epilogue", "addmm")
    assert "merge" not in candidates(problem(64, base="nf4", dropout=True), in_loop=True)
    assert "in_loop" not in candidates(problem(64, base="nf4"), in_loop=False)
    assert "merge" not in candidates(problem(64, base="int8"), in_loop=False)
    masked = problem(64, of="dx", base="nf4", dropout=True)
    assert candidates(masked, in_loop=True) == ("epilogue", "in_loop")
    assert set(candidates(problem(64, base="nf4"), in_loop=True)) < set(ALGORITHMS)


@pytest.mark.parametrize("machine", [H100, A100], ids=["H100", "A100"])
def test_the_model_decodes_in_the_loop_for_few_rows_and_merges_for_many(machine):
    """design: in-loop is five times faster than scratch at M <= 16; from M = 4096 a decode per row tile costs too much."""
    names = candidates(problem(1, base="nf4"), in_loop=True)
    assert choose_algorithm(problem(1, base="nf4"), names, machine) == "in_loop"
    assert choose_algorithm(problem(16, base="nf4"), names, machine) == "in_loop"
    assert choose_algorithm(problem(16384, base="nf4"), names, machine) == "merge"


def test_the_model_is_near_the_published_floors():
    """K = N = 4096 on an H100: base GEMM at M = 4096 139 us at full rate; NF4 to scratch at M = 1 23 us, within launches."""
    assert 139e-6 < predicted_seconds(problem(4096), "epilogue", H100) < 1.6 * 139e-6
    assert 23e-6 < predicted_seconds(problem(1, base="nf4"), "addmm", H100) < 23e-6 + 4 * 4e-6


TABLE = {
    "y-nf4-4096x4096-r16-bfloat16": {
        "16": {"epilogue": 4e-5, "addmm": 3e-5, "in_loop": 9e-5},
        "1024": {"epilogue": 9e-5, "addmm": 8e-5, "in_loop": 7e-5},
    }
}


def test_a_measurement_beats_the_model():
    names = ("epilogue", "addmm", "in_loop")
    assert choose_algorithm(problem(16, base="nf4"), names, H100, TABLE) == "addmm"
    assert choose_algorithm(problem(1024, base="nf4"), names, H100, TABLE) == "in_loop"
    assert choose_algorithm(problem(16, base="nf4"), ("epilogue", "in_loop"), H100, TABLE) == "epilogue"


def test_a_measurement_serves_rows_up_to_four_times_away():
    by_rows = TABLE["y-nf4-4096x4096-r16-bfloat16"]
    assert nearest(problem(64, base="nf4"), TABLE) == by_rows["16"]
    assert nearest(problem(300, base="nf4"), TABLE) == by_rows["1024"]
    assert nearest(problem(65, base="nf4"), TABLE) == {}
    assert nearest(problem(5000, base="nf4"), TABLE) == {}
    assert nearest(problem(16, base="fp4"), TABLE) == {}


def test_a_candidate_that_was_not_measured_is_left_to_the_model():
    assert choose_algorithm(problem(16, base="nf4"), ("merge", "panel"), H100, TABLE) in ("merge", "panel")


def test_the_choice_is_remembered_per_power_of_two(monkeypatch):
    from fastpeft.ops import algorithms

    asked = []
    monkeypatch.setattr(algorithms, "choose_algorithm", lambda p, *rest: asked.append(p.m) or "epilogue")
    algorithms.forget_choices()
    for m in (1000, 1024, 600, 1025):
        algorithm_for(problem(m), torch.device("cpu"))
    algorithms.forget_choices()
    assert asked == [1024, 2048]


def test_small_calls_are_composed_on_a_cpu():
    assert composed_is_faster(16, 64, 64, 8, torch.float32, torch.float32, False)
    assert not composed_is_faster(4096, 4096, 4096, 8, torch.float32, torch.float32, False)
    assert not composed_is_faster(17, 64, 64, 8, torch.float32, torch.float32, True)
    assert not composed_is_faster(65, 64, 64, 8, BF16, torch.float32, False)
