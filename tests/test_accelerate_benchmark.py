"""What the benchmark of accelerate computes from its measurements; the measurements themselves are run by hand."""

import pytest
import torch

from benchmarks import accelerate, curves
from benchmarks.accelerate import CASES, GOALS, PROVIDERS, goals, measure, record_of, table
from benchmarks.step import Case
from tests import tiny_models
from tests.tolerance import EQUAL_TO_THREE_DIGITS, GRADIENTS_THROUGH_A_MODEL, assert_close

ROW = {
    "case": "lora_bf16",
    "provider": "peft_accelerated",
    "cpu_ms": {"forward": 10.0, "backward": 20.4, "optimizer": 1.0, "step": 31.4},
    "wall_ms": 17.0,
    "saved_MB": 100.0,
    "steps": 4,
    "loss": 2.5,
    "cpu_speedup": 1.4,
    "wall_speedup": 1.49,
    "saved_ratio": 0.45,
    "peak_MB": 651.0,
    "peak_ratio": 0.651,
}


def _tiny():
    torch.manual_seed(0)
    return tiny_models.llama(use_cache=False)


def test_the_table_and_the_goals_are_formulas_of_the_rows():
    assert table([ROW]).splitlines()[-1] == (
        "| lora_bf16 | PEFT + fastpeft.accelerate | 31 / 1.40 | 10 + 20 + 1 | 17 / 1.49 | 100 / 0.45 | 651 / 0.65 | 2.500 |"
    )
    assert goals([ROW]) == [
        "met      lora_bf16 cpu_speedup 1.40 >= 1.4",
        "NOT MET  lora_bf16 wall_speedup 1.49 >= 1.5",
        "met      lora_bf16 saved_ratio 0.45 <= 0.45",
        "NOT MET  lora_bf16 peak_ratio 0.65 <= 0.65",
    ]
    assert goals([ROW | {"provider": "peft"}]) == []
    assert {case for case, *_ in GOALS} == set(CASES)


def test_products_are_a_part_of_a_step():
    one = accelerate.entrant(
        "peft_accelerated", Case("float32"), _tiny, accelerate.batch(tiny_models.VOCABULARY, 2, 16)
    )
    share = accelerate.products_share(one)
    assert 0 < share < 1
    assert one.steps == 2


@pytest.mark.parametrize("case", [Case("float32"), Case("bfloat16", quant="nf4"), Case("bfloat16", dora=True)], ids=str)
def test_every_provider_takes_the_same_steps_from_the_same_values(case):
    threads = torch.get_num_threads()
    rows = measure(case, _tiny, accelerate.batch(tiny_models.VOCABULARY, 2, 16), rounds=1, wall_threads=1)
    torch.set_num_threads(threads)
    names = [name for name, provider in PROVIDERS.items() if provider.only in ("", case.base)]
    assert [row["provider"] for row in rows] == names
    assert ("peft_onednn" in names) == (case.base == "float32")
    by_name = {row["provider"]: row for row in rows}
    assert {row["steps"] for row in rows} == {2 * (1 + accelerate.UNCOUNTED)}
    trained = torch.tensor([row["loss"] for name, row in by_name.items() if name != "frozen"])
    if case.base == "float32":
        assert_close("losses", trained, by_name["peft"]["loss"] + torch.zeros_like(trained), EQUAL_TO_THREE_DIGITS)
    assert (trained < by_name["frozen"]["loss"]).all()
    for key in ("cpu_speedup", "wall_speedup", "saved_ratio"):
        assert by_name["peft"][key] == 1.0
    assert len(table(rows).splitlines()) == 2 + len(rows)
    assert " - |" in table(rows)  # no peak was measured


def test_a_results_file_keeps_what_was_measured_under_the_same_settings(tmp_path):
    path = tmp_path / "results.json"
    first = record_of([ROW], path, {"rounds": 1})
    path.write_text(accelerate.json.dumps(first), encoding="utf-8")
    other = ROW | {"case": "lora_fp32"}
    assert [row["case"] for row in record_of([other], path, {"rounds": 1})["rows"]] == ["lora_fp32", "lora_bf16"]
    assert record_of([other], path, {"rounds": 2})["rows"] == [other]
    assert record_of([ROW | {"loss": 1.0}], path, {"rounds": 1})["rows"] == [ROW | {"loss": 1.0}]


def test_smollms_shape_has_its_parameters():
    with torch.device("meta"):
        model = accelerate.smollm()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_the_curves_compare_an_accelerated_model_with_the_untouched_one():
    rows = tiny_models.token_ids(8, 20).tolist()
    tasks = (
        curves.Task("llama", tiny_models.llama(use_cache=False), "random", rows, [], (2, 16)),
        curves.Task("bert", _bert_without_dropout(), "random", rows, [row[0] % 3 for row in rows], (4, 24)),
    )
    for task in tasks:
        found = curves.compare(task, torch.float32, 3, None)
        assert len(found["losses"]["untouched"]) == found["steps"] == 3
        expected, got = map(torch.tensor, found["losses"].values())
        assert_close("losses", got, expected, EQUAL_TO_THREE_DIGITS)
        assert found["largest_loss_difference"] == (got - expected).abs().max().item()
        assert found["largest_difference_to_float32"]["untouched"] == 0.0
        for error in found["gradient_error"].values():
            assert 0.0 < error < GRADIENTS_THROUGH_A_MODEL
        assert found["restored_bit_equal"] == {"outputs": True, "classes": True}
        assert found["report"]
        assert "bit-equal |" in curves.table([found])
    batch = next(tasks[0].batches(1))
    assert batch["labels"].shape == (2, 16)


def _bert_without_dropout():
    return tiny_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
