"""report.html: what it says, that it needs nothing from outside, and that no text of a record becomes markup."""

import dataclasses
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from fastpeft.training.plots import Series, confusion_matrix, line_chart, roc_chart, smooth
from fastpeft.training.quantities import bytes_text, duration_text, short_count_text, value_text
from fastpeft.training.record import CAUSAL_LM, CLASSIFICATION, RunRecord
from fastpeft.training.report import render_report, write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}
CURVE = {"fpr": [0.0, 0.1, 1.0], "tpr": [0.0, 0.8, 1.0], "auc": 0.9}


def history(steps: int = 60) -> list[dict]:
    logged = [
        {"step": step, "epoch": step / 20, "loss": 1 / step, "learning_rate": 1e-3 / step, "grad_norm": 1.0}
        for step in range(1, steps + 1)
    ]
    evaluated = [
        {"step": step, "eval_loss": 0.5, "eval_accuracy": 0.8, "eval_roc_auc": 0.9, "eval_perplexity": 1.6}
        for step in (20, 40, 60)
    ]
    return logged + evaluated


def classification(**changes) -> RunRecord:
    record = RunRecord(
        title="Reviews",
        task=CLASSIFICATION,
        model="/models/MiniLM",
        data={"test": {"rows": 1003, "truncated_rows": 0}, "train": {"rows": 8004, "truncated_rows": 5}},
        peft_config={"peft_type": "LORA", "r": 16, "target_modules": ["query", "value"], "bias": "none"},
        training={"num_train_epochs": 3.0, "max_steps": -1, "learning_rate": 1e-3, "baseline_note": "a linear probe."},
        trainable_parameters=295_682,
        total_parameters=23_009_668,
        adapter="out/adapter",
        adapter_bytes=1_190_000,
        baseline={"accuracy": 0.782, "roc_auc": 0.861, "f1": 0.784},
        metrics={"accuracy": 0.8644, "roc_auc": 0.9446, "f1": 0.8669},
        history=history(),
        seconds=284.0,
        cpu_seconds=511.0,
        peak_memory_mb=1630.0,
        labels=["negative", "positive"],
        confusion=[[433, 72], [64, 434]],
        roc=CURVE,
        baseline_roc=CURVE | {"auc": 0.8},
        examples=[
            {"text": "Good.", "label": "positive", "before": "negative", "after": "positive", "probability": 0.98},
            {"text": "Bad.", "label": "negative", "before": "negative", "after": "positive", "probability": 0.51},
        ],
        environment={"versions": {"fastpeft": "0.1.0", "torch": "2.13.0"}, "cpu": "Zen", "date": "2026-01-02T03:04:05"},
    )
    return dataclasses.replace(record, **changes)


def causal_lm(**changes) -> RunRecord:
    examples = [{"prompt": "def f(x):", "response": "Do it.", "before": "What?\n  x = 1", "after": "Do that."}]
    baseline, metrics = {"loss": 4.1, "perplexity": 60.34}, {"loss": 2.5, "perplexity": 12.18, "token_accuracy": 0.5}
    kind = {"task": CAUSAL_LM, "labels": [], "confusion": None, "roc": None, "baseline_roc": None}
    return classification(**kind | {"examples": examples, "baseline": baseline, "metrics": metrics} | changes)


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where a tag is closed that is not open."""

    def __init__(self, markup: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(markup)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def content(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_a_classification_report_says_what_happened():
    content = Page(render_report(classification())).content
    for expected in (
        "Reviews", "MiniLM · LORA r = 16 · 8,004 training rows · 2026-01-02", "Before: a linear probe.",
        "78.2 %", "86.4 %", "+8.2 points", "0.861", "0.945", "+0.084",
        "295,682 1.29 % of 23.0 M", "4 min 44 s", "1.6 GB", "1.2 MB",
        "Confusion matrix, 1,003 held-out rows", "433", "85.7%", "before, AUC 0.800", "after, AUC 0.900",
        "before: negative · after: positive (98 %) · true: positive", "✓", "✗",
        "from fastpeft import PeftModel", "from peft import PeftModel", "num_labels=2", "torch 2.13.0", "cpu Zen",
    ):  # fmt: skip
        assert expected in content, expected
    assert "steps -1" not in content


def test_a_causal_lm_report_shows_completions():
    content = Page(render_report(causal_lm())).content
    for expected in ("60.34", "12.18", "−80 %", "−1.600", "50.0 %", "def f(x):", "before What? x = 1 after Do that."):
        assert expected in content, expected
    assert "Confusion" not in content
    assert "AutoModelForCausalLM" in content


@pytest.mark.parametrize("make", [classification, causal_lm])
def test_the_page_needs_nothing_from_outside(make):
    page = Page(render_report(make()))
    assert not {"script", "link", "img", "iframe", "object", "audio", "video"} & set(page.tags)
    assert not {"src", "href", "srcset", "data"} & {name for name, _ in page.attributes}
    assert "url(" not in render_report(make())
    assert "@import" not in render_report(make())


def hostile(text: str) -> dict:
    """Fields of a record with `text` wherever a text can be, keys included."""
    example = dict.fromkeys(("text", "prompt", "label", "response", "before", "after"), text)
    return {
        "title": text,
        "model": text,
        "adapter": text,
        "data": {text: {text: text}, "train": {"rows": text}},
        "peft_config": {text: [text], "peft_type": text, "r": text, "target_modules": [text]},
        "training": {"optim": text, "baseline_note": text, text: text},
        "labels": [text, text],
        "examples": [example, example | {"probability": text}],
        "environment": {text: text, "date": text, "device": text, "versions": {text: text, "fastpeft": text}},
    }


@pytest.mark.parametrize("make", [classification, causal_lm])
@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=x>', "' onclick='x", "</style>&"])
def test_no_text_becomes_markup(make, text):
    page, plain = Page(render_report(make(**hostile(text)))), Page(render_report(make()))
    assert set(page.tags) <= set(plain.tags)
    assert {name for name, _ in page.attributes} <= {name for name, _ in plain.attributes}
    assert " ".join(page.text).count(text) > 15


def test_the_same_module_of_many_layers_is_named_once():
    """ "all-linear" is saved as the full path of every module: 210 of them in a 30-layer model."""
    paths = [f"model.layers.{layer}.{name}" for layer in range(30) for name in ("mlp.up_proj", "self_attn.q_proj")]
    page = render_report(causal_lm(peft_config={"r": 16, "target_modules": [*paths, "lm_head"]}))
    assert "Adapters in every lm_head, mlp.up_proj, self_attn.q_proj." in page
    assert "layers" not in page
    pattern = r".*\.[0-9]+\.mlp\..*"
    assert pattern in render_report(causal_lm(peft_config={"r": 16, "target_modules": pattern}))


def test_a_record_with_nothing_in_it_gives_a_page():
    for task in (CLASSIFICATION, CAUSAL_LM):
        assert "Empty" in Page(render_report(RunRecord(title="Empty", task=task, model="m"))).content


def test_values_that_are_not_finite_are_left_out():
    record = classification(
        history=[{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}],
        baseline={},
        metrics={"accuracy": 0.5, "roc_auc": None},
    )
    page = render_report(record)
    assert "nan" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)
    assert "ROC-AUC" not in Page(page).content


def test_a_worse_result_is_shown_as_one():
    assert 'class="card metric worse"' in render_report(causal_lm(metrics={"loss": 4.2}))
    assert 'class="card metric worse"' not in render_report(causal_lm())


def test_the_report_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = write_report(classification(), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == render_report(classification())
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(causal_lm(), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["report.html"]


def test_charts_are_well_formed_and_stay_inside_their_frame():
    points = [(step, (step % 7) / 7) for step in range(1, 2001)]
    chart = line_chart(
        [Series("a < b", points), Series("c", points[::100], "second", marked=True)], title="T", x_label="x"
    )
    svg = ET.fromstring(re.search(r"<svg.*</svg>", chart).group())
    _, _, width, height = map(float, svg.get("viewBox").split())
    paths = [path for path in svg.iter("path") if "curve" in path.get("class")]
    assert len(paths) == 2
    for path in paths:
        coordinates = [float(number) for number in re.findall(r"[\d.]+", path.get("d"))]
        assert len(coordinates) <= 2 * 402
        assert min(coordinates) >= 0
        assert max(coordinates[::2]) <= width
        assert max(coordinates[1::2]) <= height
    assert "a &lt; b" in chart


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, 0.0), (2, 0.0)], [(0, -3.0), (5, -3.0)], [(1, 1e-9), (2, 1e9)]])
def test_charts_of_few_or_equal_values(points):
    chart = line_chart([Series("s", points)], title="T", x_label="x")
    ET.fromstring(re.search(r"<svg.*</svg>", chart).group())
    assert "inf" not in chart
    assert "nan" not in chart


def test_no_points_no_chart():
    assert line_chart([Series("s", [])], title="T", x_label="x") == ""


def test_roc_chart_is_well_formed():
    chart = roc_chart([("before", "before", CURVE), ("after", "after", CURVE)], title="ROC")
    ET.fromstring(re.search(r"<svg.*</svg>", chart).group())
    assert chart.count('class="area"') == 1


def test_confusion_matrix_shares_are_of_the_true_class():
    table = ET.fromstring(
        re.search(r"<table.*</table>", confusion_matrix(["a", "b", "c"], [[3, 1, 0], [0, 5, 5], [0, 0, 0]])).group()
    )
    cells = [[cell.find("span").text for cell in row.findall("td") if cell.get("class")] for row in table.find("tbody")]
    assert cells == [["75.0%", "25.0%", "0.0%"], ["0.0%", "50.0%", "50.0%"], ["0.0%", "0.0%", "0.0%"]]


def test_smoothing_keeps_a_straight_line_and_both_ends():
    line = [(step, 2.0 * step) for step in range(20)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    noisy = [(step, float(step % 2)) for step in range(20)]
    assert smooth(noisy)[0] == noisy[0]
    assert all(0.4 < y < 0.6 for _, y in smooth(noisy)[4:-4])


def test_quantities_read_as_people_write_them():
    assert [duration_text(s) for s in (0.42, 41.5, 284.4, 7384)] == ["0.4 s", "41.5 s", "4 min 44 s", "2 h 3 min"]
    assert [bytes_text(b) for b in (12, 1_190_000, 2.6e9)] == ["12 B", "1.2 MB", "2.6 GB"]
    assert [short_count_text(n) for n in (770, 295_682, 22_713_986, 1.24e9)] == ["770", "295.7 k", "22.7 M", "1.2 B"]
    assert value_text({"a": [True, 1000, 1e-3], "b": None}) == "a: yes, 1,000, 0.001, b: None"
