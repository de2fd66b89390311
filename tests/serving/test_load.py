"""What the load script of the benchmarks computes; its measurements are run by hand."""

import asyncio

from benchmarks.serving import load, make_adapters, percentiles, table
from fastpeft.serving.app import make_app
from fastpeft.serving.engine import Engine, Limits
from tests.serving.tiny_server import listening
from tests.training import tiny


def test_percentiles_are_nearest_ranks():
    assert percentiles([float(value) for value in range(100, 0, -1)]) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert percentiles([3.0]) == {"p50": 3, "p90": 3, "p99": 3, "max": 3}


def test_a_load_counts_answers_that_differ_from_those_one_by_one(tmp_path, monkeypatch):
    model = tiny.llama(tmp_path / "llama")
    monkeypatch.setattr("benchmarks.serving.PROMPTS", ("w1 w2", "w3"))
    engine = Engine.load(str(model), make_adapters(str(model), tmp_path), Limits(max_wait_ms=20), use_cpu=True)
    with listening(make_app(engine)) as url:
        found = asyncio.run(load(url, 12, 6, 4))
        assert (found["errors"], found["other_than_alone"]) == (0, 0)
        assert found["mean_batch"] > 1
        assert found["p50_s"] <= found["p99_s"] <= found["max_s"]
        assert "| 12 |" in table([found])
        count = iter(range(10**6))
        write = engine._write
        monkeypatch.setattr(engine, "_write", lambda requests, names: _numbered(write, requests, names, count))
        assert asyncio.run(load(url, 12, 6, 4))["other_than_alone"] == 12


def _numbered(write, requests, names, count):
    """Every answer gets a number: no two are alike."""
    for request in requests:
        answer = request.answer
        request.answer = lambda value, answer=answer: answer(value | {"text": f"{next(count)}"})
    write(requests, names)
