"""The engine: every kind of adapter gives what it gives by itself; classification; what is refused before a model is read."""

import threading

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastpeft import BOFTConfig, IA3Config, PromptTuningConfig
from fastpeft.serving.engine import Engine, Limits, UnknownAdapter
from fastpeft.serving.writing import RowSampler, Sampling, nucleus
from fastpeft.training.predict import TrainedAdapter
from tests import tolerance
from tests.serving.tiny_server import LABELS, llama_in_whole_blocks, lora, save_adapter
from tests.tolerance import assert_close
from tests.training import tiny

TEXTS = ["w1 w2", "lovely w3 w4 w5", "dull"]


def answers(engine, requests):
    """All in one go, so that they share batches."""
    for request in requests:
        engine.submit(request)
    return [request.future.result(60) for request in requests]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    return folder, tiny.llama(folder / "llama"), tiny.bert(folder / "bert")


KINDS = {
    "lora": lambda: lora(1),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "dora": lambda: lora(1, use_dora=True),
    "pissa": lambda: lora(1, init_lora_weights="pissa"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3),
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=["o_proj"]),
}
ALONE = {"dora": "DoRA", "pissa": "base weights", "prompt": "prompt"}


def test_every_kind_of_adapter_side_by_side(files):
    """Adapters that cannot be mixed are batched by themselves, and leave nothing behind for the others."""
    folder, model, _ = files
    folders = {name: save_adapter(folder / name, model, make(), 3) for name, make in KINDS.items()}
    engine = Engine.load(str(model), folders, Limits(max_wait_ms=50), use_cpu=True)
    served = {row["name"]: row for row in (one.describe() for one in engine.served.values())}
    assert {name for name, row in served.items() if not row["mixed"]} == set(ALONE)
    for name, reason in ALONE.items():
        assert reason in served[name]["why_not_mixed"]
    names = [*KINDS, "__base__"]
    sampling = Sampling(max_new_tokens=5)
    found: dict = {}
    for _ in range(2):  # the second time after every other kind has acted
        asked = [(name, text) for text in TEXTS for name in names]
        found = dict(zip(asked, answers(engine, [engine.generation(n, t, sampling) for n, t in asked]), strict=True))
        for name in KINDS:
            alone = TrainedAdapter.load(folders[name], use_cpu=True)
            expected = alone.generate(TEXTS, max_new_tokens=5, batch_size=1)
            assert [found[name, text]["text"] for text in TEXTS] == expected, name
    assert len({found[name, TEXTS[1]]["text"] for name in names}) > 4
    plain = TrainedAdapter.load(folders["lora"], use_cpu=True)
    with plain.model.disable_adapter():
        assert [found["__base__", text]["text"] for text in TEXTS] == plain.generate(TEXTS, max_new_tokens=5)
    engine.close()


def test_classes_of_two_adapters_in_one_batch(files):
    folder, _, model = files
    config = lambda seed: lora(seed, target_modules=["query", "value"])  # noqa: E731
    labels = {"c": LABELS, "d": ["no", "yes"]}
    folders = {n: save_adapter(folder / n, model, config(s), s, labels[n]) for s, n in enumerate("cd", 1)}
    engine = Engine.load(str(model), folders, Limits(max_wait_ms=50), use_cpu=True)
    assert sorted(engine.served) == ["c", "d"], "a head that was made anew is not served"
    asked = [(name, text) for text in TEXTS for name in folders]
    found = dict(zip(asked, answers(engine, [engine.classification(*one) for one in asked]), strict=True))
    for name in folders:
        expected = TrainedAdapter.load(folders[name], use_cpu=True).classify(TEXTS, batch_size=1)
        for text, row in zip(TEXTS, expected, strict=True):
            got = found[name, text]
            assert (got["label"], list(got["probabilities"])) == (row["label"], labels[name])
            pair = (torch.tensor(list(one["probabilities"].values())) for one in (got, row))
            assert_close(name, *pair, tolerance.LOGITS_EQUAL_TO_PEFT)
    with pytest.raises(ValueError, match="expected at most 64 tokens, got 72"):
        engine.classification("c", "w1 " * 70)
    with pytest.raises(UnknownAdapter, match=r"expected one of \['c', 'd'\], got '__base__'"):
        engine.classification("__base__", "w1")
    engine.close()


def test_a_base_with_a_trained_head_and_no_adapter(files, tmp_path):
    _, _, encoder = files
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    AutoModelForSequenceClassification.from_pretrained(encoder, **names).save_pretrained(tmp_path)
    tiny.tokenizer(encoder=True).save_pretrained(tmp_path)
    engine = Engine.load(str(tmp_path), {}, use_cpu=True)
    assert (engine.task, engine.served["__base__"].labels) == ("classification", LABELS)
    (found,) = answers(engine, [engine.classification("__base__", "w1", "w2")])
    assert set(found["probabilities"]) == set(LABELS)
    engine.close()


def test_rows_end_at_their_own_length_and_a_short_one_is_answered_first(files):
    _, model, _ = files
    engine = Engine.load(str(model), {}, Limits(max_wait_ms=10_000, max_batch=2), use_cpu=True)
    engine.end_ids = set()
    short = engine.generation("__base__", "w1", Sampling(max_new_tokens=2))
    long = engine.generation("__base__", "w2", Sampling(max_new_tokens=30))
    order: list[str] = []
    for name, request in (("long", long), ("short", short)):
        request.future.add_done_callback(lambda future, name=name: order.append((name, long.future.done())))
    found = answers(engine, [long, short])
    assert [row["generated_tokens"] for row in found] == [30, 2]
    assert {row["finish_reason"] for row in found} == {"length"}
    assert order == [("short", False), ("long", True)]
    engine.close()


def test_refusals_come_before_the_model_is_read(files, monkeypatch):
    folder, model, encoder = files
    one = save_adapter(folder / "text", model, lora(1), 1)
    two = save_adapter(folder / "class", encoder, lora(1, target_modules=["query"]), 1, LABELS)
    three = save_adapter(folder / "class3", encoder, lora(1, target_modules=["query"]), 1, ["x", "y", "z"])
    monkeypatch.setattr("fastpeft.serving.engine.load_base", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(ValueError, match="expected adapters of one task"):
        Engine.load(str(model), {"a": one, "b": two})
    with pytest.raises(ValueError, match="expected adapters of one number of classes"):
        Engine.load(str(encoder), {"a": two, "b": three})
    with pytest.raises(ValueError, match="without dots"):
        Engine.load(str(model), {"__base__": one})
    with pytest.raises(FileNotFoundError):
        Engine.load(str(model), {"a": folder / "nothing"})
    with pytest.raises(ValueError, match="max_batch: expected at least 1, got 0"):
        Limits(max_batch=0)
    assert threading.active_count() < 50


def test_a_quantised_base(tmp_path):
    model = llama_in_whole_blocks(tmp_path / "llama")
    folders = {name: save_adapter(tmp_path / name, model, lora(seed), seed) for seed, name in enumerate("ab", 1)}
    engine = Engine.load(str(model), folders, Limits(max_wait_ms=50), quantization="nf4", use_cpu=True)
    sampling = Sampling(max_new_tokens=3)
    together = answers(engine, [engine.generation(name, TEXTS[1], sampling) for name in "ab"])
    alone = [answers(engine, [engine.generation(name, TEXTS[1], sampling)])[0] for name in "ab"]
    assert together == alone
    engine.close()


def test_draws_have_the_distribution_that_temperature_and_top_p_give():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 4000
    rows = [Sampling(temperature=0.7, top_p=0.9, seed=seed) for seed in range(count)]
    drawn = RowSampler([*rows, Sampling()])(torch.empty(0), logits.repeat(count + 1, 1))
    assert torch.equal(drawn[-1], logits), "a greedy row is left alone"
    p = (logits / 0.7).softmax(-1)
    kept = torch.tensor([True, True, False, False])  # 0.77 + 0.18 >= 0.9
    assert torch.equal(nucleus(p.log(), 0.9).isfinite(), kept)
    share = drawn[:-1].argmax(-1).bincount(minlength=4) / count
    p = p * kept / (p * kept).sum()
    sigma = (p * (1 - p) / count).sqrt()
    assert ((share - p).abs() <= tolerance.MEAN_OF_DRAWS_SIGMAS * sigma).all()
