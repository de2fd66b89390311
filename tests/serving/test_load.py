"""What the load script of the benchmarks computes; its measurements are run by hand."""

import asyncio

import pytest

from benchmarks.serving import ADAPTERS, NAMES, Judge, load, make_adapters, percentiles, table
from fastpeft.serving.app import make_app
from fastpeft.serving.engine import Engine, Limits
from tests.serving.tiny_server import listening
from tests.training import tiny


def test_percentiles_are_nearest_ranks():
    assert percentiles([float(value) for value in range(100, 0, -1)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert percentiles([3.0]) == {"p50": 3, "p90": 3, "p99": 3, "max": 3}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An engine with the benchmark's adapters, and the judge of its answers."""
    model = tiny.llama(tmp_path / "llama")
    monkeypatch.setattr("benchmarks.serving.PROMPTS", ("w1 w2", "w3"))
    monkeypatch.setattr("benchmarks.serving.SPREAD", 0.3)
    adapters = make_adapters(str(model), tmp_path)
    return Engine.load(str(model), adapters, Limits(max_wait_ms=20), use_cpu=True), Judge(str(model), adapters)


def test_a_load_counts_answers_that_differ_from_those_one_by_one(served, monkeypatch):
    engine, judge = served
    with listening(make_app(engine)) as url:
        found = asyncio.run(load(url, 12, 6, 6, judge))
        assert (found["errors"], found["wrong_adapter"], found["other_text_than_alone"]) == (0, 0, 0)
        assert found["smallest_margin"] > 0
        assert sum(found["batches"].values()) < 12
        assert found["p50_s"] <= found["p99_s"] <= found["max_s"]
        assert "| 12 |" in table([{"max_batch": 16, **found}])
        count = iter(range(10**6))
        write = engine._write
        monkeypatch.setattr(engine, "_write", lambda requests, names: _numbered(write, requests, names, count))
        monkeypatch.setattr(judge, "margin", lambda *_: 1.0)
        assert asyncio.run(load(url, 12, 6, 6, judge))["other_text_than_alone"] == 12


def test_a_load_finds_answers_of_the_wrong_adapter(served, monkeypatch):
    """A batch of several rows here computes the second adapter where the first is asked for, and the other way round."""
    wrong = 0
    engine, judge = served
    other = dict(zip(ADAPTERS, reversed(ADAPTERS)))
    write = engine._write

    def exchanged(requests, names):
        nonlocal wrong
        asked = names["adapter_names"]
        if len(asked) > 1:
            wrong += sum(name in other for name in asked)
            asked = [other.get(name, name) for name in asked]
        write(requests, {"adapter_names": asked})

    monkeypatch.setattr(engine, "_write", exchanged)
    with listening(make_app(engine)) as url:
        found = asyncio.run(load(url, 12, 12, 6, judge))
    assert wrong > 0
    assert (found["errors"], found["checked"], found["wrong_adapter"]) == (0, 12, wrong)
    assert found["smallest_margin"] < 0


def test_adapters_that_say_the_same_are_no_load(served, monkeypatch):
    engine, judge = served
    monkeypatch.setattr(judge, "_likelihoods", lambda *_: dict.fromkeys(NAMES, -1.0))
    with listening(make_app(engine)) as url, pytest.raises(ValueError, match="tell the adapters apart"):
        asyncio.run(load(url, 3, 1, 1, judge))


def _numbered(write, requests, names, count):
    """Every answer gets a number: no two are alike."""
    for request in requests:
        answer = request.answer
        request.answer = lambda value, answer=answer: answer(value | {"text": f"{next(count)}"})
    write(requests, names)
