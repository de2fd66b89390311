"""What the end-to-end benchmark makes of its measurements; the measurements themselves are run by hand."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import end_to_end
from benchmarks.end_to_end import CASES, TRAINERS, measure, steps_of, table
from benchmarks.texts import BRANCHES, markov
from tests import tiny_models


def tiny():
    torch.manual_seed(0)
    return tiny_models.llama(use_cache=False)


def measured(case="lora_bf16", broken=None):
    rows = {name: {} for name in TRAINERS}
    if broken:
        rows[broken] = {"failed": "exit code -9: killed, out of memory?"}
    threads = torch.get_num_threads()
    measure(rows, CASES[case], tiny, markov(16 * 6) % tiny_models.VOCABULARY, 16, 4, 1)
    torch.set_num_threads(threads)
    return rows


def with_case(rows):
    return [{"case": "lora_bf16", "tokens": 16, "provider": name, **row} for name, row in rows.items()]


def test_every_provider_trains_on_the_same_batches_from_the_same_values():
    rows = measured("dora_bf16")
    for row in rows.values():
        assert len(row["losses"]) == 4
        assert row["alike"], row
        assert {"cpu_tokens_per_s", "wall_tokens_per_s", "held_out", "cpu_speedup", "wall_speedup"} <= row.keys()
    assert rows["peft"]["cpu_speedup"] == 1.0
    assert rows["peft"]["loss_difference"] == 0.0


def test_what_fails_is_a_row_and_what_differs_has_no_ratio():
    rows = measured(broken="fastpeft_accelerated")
    assert rows["fastpeft_accelerated"] == {"failed": "exit code -9: killed, out of memory?"}
    apart = rows["peft_accelerated"]
    apart["alike"] = False
    text = table(with_case(rows | {"unsloth": {"absent": "Unsloth needs a GPU"}}))
    assert "failed: exit code -9" in text
    assert "absent: Unsloth needs a GPU" in text
    assert "/ losses apart" in text
    assert f"/ {apart['cpu_speedup']:.2f} " not in text.splitlines()[3]


def test_a_provider_that_raises_becomes_a_row(monkeypatch):
    def refuse(name, *rest):
        if name == "peft":
            raise RuntimeError("out of memory")
        return entrant(name, *rest)

    entrant = end_to_end.entrant
    monkeypatch.setattr(end_to_end, "entrant", refuse)
    rows = measured()
    assert rows["peft"] == {"failed": "RuntimeError: out of memory"}
    assert len(rows["fastpeft_accelerated"]["losses"]) == 4
    assert "cpu_speedup" not in rows["fastpeft_accelerated"]


def test_losses_that_are_apart_are_found():
    rows = {
        name: {"losses": [2.0, loss], "held_out": 2.0, "peak_MB": peak}
        for name, loss, peak in (
            ("peft", 1.0, 4.0),
            ("peft_accelerated", 1.004, 1.0),
            ("fastpeft_accelerated", 1.1, 1.0),
        )
    }
    end_to_end._beside_peft(rows, {name: {"cpu": [1.0], "wall": []} for name in rows})
    assert [row["alike"] for row in rows.values()] == [True, True, False]
    assert rows["peft_accelerated"]["peak_ratio"] == 0.25


def test_longer_rows_take_fewer_steps():
    assert [steps_of(length, 24) for length in (32, 512, 1024, 4096, 8192)] == [24, 24, 12, 3, 3]


def test_the_chain_has_few_successors_and_is_the_same_every_time():
    ids = markov(5000).tolist()
    followers = {}
    for one, two in itertools.pairwise(ids):
        followers.setdefault(one, set()).add(two)
    assert max(map(len, followers.values())) <= BRANCHES
    assert markov(5000).tolist() == ids


def test_the_plots_and_wrong_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.json"
    machine = {"cpu": "a CPU", "isa": "avx2", "cores": 2, "commit": "abc", "versions": {"torch": "2"}}
    rows = with_case(measured())
    rows = [row | {"peak_MB": 1.0} for row in rows] + [row | {"peak_MB": 2.0, "tokens": 32} for row in rows]
    path.write_text(json.dumps({"benchmark": "end-to-end", "machine": machine, "rows": rows}))
    assert end_to_end.run(SimpleNamespace(report=path)) == 0
    names = {one.name for one in path.with_suffix("").iterdir()}
    assert names == {f"{n}.{k}" for n in ("losses", "tokens_per_second", "peak_memory") for k in ("svg", "png")}
    path.write_text("{}")
    assert command.main(["end-to-end", "--report", str(path)]) == 2
    assert "expected a results file" in capsys.readouterr().err
