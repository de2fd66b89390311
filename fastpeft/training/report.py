"""report.html of one training run: a single self-contained page, readable offline and without scripts."""

import json
import os
import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from fastpeft.training.html_page import html_page, section, write_html
from fastpeft.training.plots import Series, confusion_matrix, line_chart, roc_chart, smooth
from fastpeft.training.quantities import bytes_text, count_text, duration_text, share_text, short_count_text, value_text
from fastpeft.training.record import CLASSIFICATION, RunRecord

_SPLITS = ("train", "validation", "test")
_SMOOTH_FROM = 30  # logged losses; fewer are drawn as they are


def write_report(record: RunRecord, path: str | os.PathLike) -> Path:
    """Write the report of `record` to `path` through a temporary name, and return the path.

    The page needs no network, no script and no font file. Every text of the record is escaped.
    Raises OSError where the folder cannot be written; an existing report is then left as it was.
    """
    return write_html(render_report(record), path)


def render_report(record: RunRecord) -> str:
    """The page as text. Sections without data are left out."""
    sections = [
        _header(record),
        _headline(record),
        section("Training", _training_charts(record)),
        section("Held-out evaluation", _evaluation(record)),
        section("What is trained", _parameters(record)),
        section("Examples from the held-out set", _examples(record)),
        section("Settings", _settings(record)),
        section("Load this adapter", _loading(record)),
        _footer(record),
    ]
    return html_page(record.title, sections)


def _header(record: RunRecord) -> str:
    method = str(record.peft_config.get("peft_type", "")).split(".")[-1]
    rank = record.peft_config.get("r")
    rows = record.data.get("train", {}).get("rows")
    parts = [
        Path(record.model).name or record.model,
        f"{method} r = {rank}" if method and rank else method,
        f"{count_text(rows)} training rows" if isinstance(rows, int) else "",
        str(record.environment.get("date", "")).split("T")[0],
    ]
    return (
        f'<header>\n<p class="eyebrow">fastpeft run report</p>\n<h1>{escape(record.title)}</h1>\n'
        f'<p class="subtitle">{escape("  ·  ".join(filter(None, parts)))}</p>\n</header>'
    )


# --- headline ---------------------------------------------------------------------------------------------------------

# name: (shown as, format, higher is better)
_METRICS: dict[str, tuple[str, Callable[[float], str], bool]] = {
    "accuracy": ("Accuracy", lambda v: f"{100 * v:.1f}\u202f%", True),
    "roc_auc": ("ROC-AUC", lambda v: f"{v:.3f}", True),
    "f1": ("F1", lambda v: f"{v:.3f}", True),
    "perplexity": ("Perplexity", lambda v: f"{v:.2f}" if v < 100 else f"{v:.0f}", False),
    "token_accuracy": ("Next-token accuracy", lambda v: f"{100 * v:.1f}\u202f%", True),
    "loss": ("Loss, nats per token", lambda v: f"{v:.3f}", False),
}


def _headline(record: RunRecord) -> str:
    names = ("accuracy", "roc_auc", "f1") if record.task == CLASSIFICATION else ("perplexity", "loss", "token_accuracy")
    cards = [_metric_card(name, record) for name in names if record.metrics.get(name) is not None]
    note = record.training.get("baseline_note")
    facts = [
        (
            "Trainable parameters",
            count_text(record.trainable_parameters),
            f"{share_text(record.trainable_parameters, record.total_parameters)} of {short_count_text(record.total_parameters)}",
        ),
        ("Wall-clock time", duration_text(record.seconds), f"{duration_text(record.cpu_seconds)} of CPU time"),
        (
            "Peak memory",
            bytes_text(record.peak_memory_mb * 1e6),
            "resident" if record.environment.get("device", "cpu") == "cpu" else "allocated on the GPU",
        ),
        ("Adapter on disk", bytes_text(record.adapter_bytes), "safetensors, PEFT's format"),
    ]
    if record.base.get("bytes"):
        facts.insert(1, ("Base model in memory", bytes_text(record.base["bytes"]), _storage(record.base)))
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return (
        (f'<div class="cards">{"".join(cards)}</div>\n' if cards else "")
        + f'<dl class="facts">{shown}</dl>\n'
        + (f'<p class="note">Before: {escape(str(note))}</p>' if note else "")
    )


def _storage(base: Mapping[str, Any]) -> str:
    """How the base's linear weights are held: NF4 in blocks of 64, scales in 8 bits."""
    kind = str(base.get("quantization", "none"))
    if kind == "none":
        return "full weights, frozen"
    blocks = f" in blocks of {base['blocksize']}" if "blocksize" in base else ""
    return f"linear weights in {kind.upper()}{blocks}" + (", scales in 8 bits" if base.get("double_quant") else "")


def _metric_card(name: str, record: RunRecord) -> str:
    label, show, higher_is_better = _METRICS[name]
    after, before = record.metrics[name], record.baseline.get(name)
    if before is None:
        values, delta = f'<span class="new">{show(after)}</span>', "on the held-out set"
    else:
        values = (
            f'<span class="old">{show(before)}</span><span class="arrow">→</span><span class="new">{show(after)}</span>'
        )
        delta = f"<b>{_change(name, before, after)}</b> on the held-out set"
    worse = before is not None and after != before and (after > before) != higher_is_better
    return (
        f'<div class="card metric{" worse" if worse else ""}"><div class="name">{label}</div>'
        f'<div class="values">{values}</div><div class="delta">{delta}</div></div>'
    )


def _change(name: str, before: float, after: float) -> str:
    if name in ("accuracy", "token_accuracy"):
        return f"{_signed(100 * (after - before), '.1f')} points"
    if name == "perplexity" and before > 0:
        return f"{_signed(100 * (after / before - 1), '.0f')} %"
    return _signed(after - before, ".3f")


def _signed(value: float, spec: str) -> str:
    return f"{value:+{spec}}".replace("-", "−")


# --- charts -----------------------------------------------------------------------------------------------------------


def _training_charts(record: RunRecord) -> str:
    loss = _history(record, "loss")
    curves = [Series("training", smooth(loss) if len(loss) >= _SMOOTH_FROM else loss)]
    if len(loss) >= _SMOOTH_FROM:
        curves.insert(0, Series("training, each logged step", loss, faint=True))
    curves.append(Series("validation", _history(record, "eval_loss"), "second", marked=True))
    charts = [line_chart(curves, title="Loss", x_label="step")]
    if record.task == CLASSIFICATION:
        points = [Series("accuracy", _history(record, "eval_accuracy"), "second", marked=True)]
        points.append(Series("ROC-AUC", _history(record, "eval_roc_auc"), "after", marked=True))
        charts.append(line_chart(points, title="Validation", x_label="step"))
    else:
        points = [Series("perplexity", _history(record, "eval_perplexity"), "second", marked=True)]
        charts.append(line_chart(points, title="Validation perplexity", x_label="step"))
    rate = [Series("learning rate", _history(record, "learning_rate"), "before")]
    charts.append(line_chart(rate, title="Learning rate", x_label="step", height=190, zero=True))
    norm = [Series("gradient norm", _history(record, "grad_norm"), "before")]
    charts.append(line_chart(norm, title="Gradient norm", x_label="step", height=190, zero=True))
    shown = "".join(charts)
    return f'<div class="grid">{shown}</div>' if shown else ""


def _history(record: RunRecord, name: str) -> list[tuple[float, float]]:
    return [
        (entry["step"], entry[name])
        for entry in record.history
        if isinstance(entry.get(name), (int, float)) and isinstance(entry.get("step"), (int, float))
    ]


def _evaluation(record: RunRecord) -> str:
    parts = []
    if record.confusion:
        rows = record.data.get("test", record.data.get("validation", {})).get("rows")
        title = f"Confusion matrix, {count_text(rows)} held-out rows" if isinstance(rows, int) else "Confusion matrix"
        matrix = confusion_matrix(record.labels, record.confusion)
        parts.append(f"<figure><figcaption><b>{title}</b></figcaption>{matrix}</figure>")
    curves = [("before", "before", record.baseline_roc)] if record.baseline_roc else []
    curves += [("after", "after", record.roc)] if record.roc else []
    if curves:
        parts.append(roc_chart(curves, title="ROC curve"))
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""


def _parameters(record: RunRecord) -> str:
    if not record.total_parameters:
        return ""
    part = record.trainable_parameters / record.total_parameters
    share = share_text(record.trainable_parameters, record.total_parameters)
    frozen = record.total_parameters - record.trainable_parameters
    targets = _targets(record.peft_config.get("target_modules"))
    where = f'<p class="note">Adapters in every {escape(", ".join(targets))}.</p>' if targets else ""
    return (
        '<div class="card parameters">'
        f'<div class="bar"><i style="width:{100 * part:.3f}%"></i></div>'
        f'<div class="legend">'
        f'<span class="key after">{count_text(record.trainable_parameters)} trained ({share})</span>'
        f'<span class="key before">{count_text(frozen)} frozen</span></div>{where}</div>'
    )


def _targets(modules: Any) -> list[str]:
    """Target modules by their names within a layer: model.layers.0.mlp.up_proj ... model.layers.29.mlp.up_proj is one.

    A path without a number, and a regular expression, stay as they are.
    """
    names = [modules] if isinstance(modules, str) else sorted(map(str, modules or ()))
    return list(dict.fromkeys(re.sub(r"^([A-Za-z_]\w*\.)*\d+\.(?=[A-Za-z_])", "", name) for name in names))


# --- examples ---------------------------------------------------------------------------------------------------------


def _examples(record: RunRecord) -> str:
    show = _classified if record.task == CLASSIFICATION else _completed
    cards = "".join(show(example) for example in record.examples)
    return f'<div class="examples">{cards}</div>' if cards else ""


def _classified(example: Mapping[str, Any]) -> str:
    label, before, after = (str(example.get(key, "")) for key in ("label", "before", "after"))
    probability = example.get("probability")
    sure = f" ({100 * probability:.0f} %)" if isinstance(probability, (int, float)) else ""
    change = f"before: {escape(before)} · " if before else ""
    verdict = f"{change}after: <b>{escape(after)}</b>{sure} · true: {escape(label)}"
    kind, sign = ("right", "✓") if after == label else ("wrong", "✗")
    return (
        f'<div class="card example {kind}"><span class="mark" role="img" aria-label="{kind}">{sign}</span>'
        f'<p>{escape(str(example.get("text", "")))}</p><p class="verdict">{verdict}</p></div>'
    )


def _completed(example: Mapping[str, Any]) -> str:
    rows = [
        ("before", example.get("before")),
        ("after", example.get("after")),
        ("reference", example.get("response")),
    ]
    shown = "".join(
        f'<dt>{name}</dt><dd class="is-{name}">{escape(str(text))}</dd>' for name, text in rows if text is not None
    )
    prompt = escape(str(example.get("prompt", "")))
    return f'<div class="card completion"><pre>{prompt}</pre><dl>{shown}</dl></div>'


# --- tables -----------------------------------------------------------------------------------------------------------


# Options of a run and their names here; the rest is in run.json.
_OPTIONS = {
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warm-up, part of the steps",
    "optim": "optimizer",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient norm at most",
    "per_device_train_batch_size": "batch size",
    "gradient_accumulation_steps": "batches per step",
    "max_length": "tokens per row at most",
    "group_by_length": "rows grouped by length",
    "dtype": "base weights",
    "bf16": "bfloat16 autocast",
    "gradient_checkpointing": "gradient checkpointing",
    "load_best_model_at_end": "best checkpoint kept",
    "seed": "seed",
}


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {}, ())


def _settings(record: RunRecord) -> str:
    adapter = {key: value for key, value in record.peft_config.items() if _says_something(value)}
    if "target_modules" in adapter:
        adapter["target_modules"] = _targets(adapter["target_modules"])
    chosen = dict(record.training)
    chosen.pop("num_train_epochs" if chosen.get("max_steps", -1) > 0 else "max_steps", None)
    training = {name: chosen[key] for key, name in _OPTIONS.items() if _says_something(chosen.get(key))}
    machine = {key: value for key, value in record.environment.items() if key != "versions"}
    machine |= {key: value for key, value in record.acceleration.items() if key == "float32_products" and value}
    versions = record.environment.get("versions", {})
    left = (
        _card("Adapter", _pairs(adapter))
        + _card("Data", _data_table(record.data))
        + _card("Versions", _pairs(versions))
    )
    replaced = "\n".join(record.acceleration.get("summary", ()))
    right = _card("Training", _pairs(training)) + _card("Machine", _pairs(machine))
    right += _card("Acceleration", replaced and f"<pre>{escape(replaced)}</pre>")
    return f'<div class="grid"><div class="stack">{left}</div><div class="stack">{right}</div></div>'


def _card(title: str, body: str) -> str:
    return f'<div class="card"><h3>{title}</h3>{body}</div>' if body else ""


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key).replace("_", " "))}</th><td>{escape(value_text(value))}</td></tr>'
        for key, value in values.items()
    )
    return f'<table class="table"><tbody>{rows}</tbody></table>' if rows else ""


def _data_table(data: Mapping[str, Mapping[str, Any]]) -> str:
    data = {name: data[name] for name in sorted(data, key=lambda name: (*_SPLITS, name).index(name))}
    columns = list(dict.fromkeys(key for split in data.values() for key, value in split.items() if value))
    head = "".join(f'<th scope="col">{escape(str(column).replace("_", " "))}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th>'
        + "".join(f"<td>{escape(value_text(split.get(column, 0)))}</td>" for column in columns)
        + "</tr>"
        for name, split in data.items()
    )
    return (
        f'<div class="scroll"><table class="table numbers"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        if rows
        else ""
    )


def _loading(record: RunRecord) -> str:
    if not record.adapter:
        return ""
    kind, extra = "AutoModelForCausalLM", ""
    if record.task == CLASSIFICATION:
        kind, extra = "AutoModelForSequenceClassification", f", num_labels={len(record.labels) or 2}"
    imports, quantized = kind, _quantization_argument(record.base)
    if quantized:
        imports, extra = f"BitsAndBytesConfig, {kind}", f"{extra},\n    quantization_config={quantized}"
    cards = "".join(
        f"<div class='card'><h3>{title}</h3><pre>"
        + escape(
            f"from transformers import {imports}\nfrom {module} import PeftModel\n\n"
            f"base = {kind}.from_pretrained(\n    {_quoted(record.model)}{extra})\n"
            f"model = PeftModel.from_pretrained(\n    base, {_quoted(record.adapter)})\n"
        )
        + "</pre></div>"
        for title, module in (("With fastpeft", "fastpeft"), ("With Hugging Face PEFT", "peft"))
    )
    note = '<p class="note">The same files, the same outputs: only the import differs.</p>'
    return f'<div class="grid">{cards}</div>\n{note}'


def _quantization_argument(base: Mapping[str, Any]) -> str:
    """transformers' quantization_config for such a base, as Python; empty for full weights."""
    kind = base.get("quantization", "none")
    if kind == "none":
        return ""
    if kind == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    return (
        f"BitsAndBytesConfig(\n        load_in_4bit=True, bnb_4bit_quant_type={_quoted(str(kind))},\n"
        f"        bnb_4bit_use_double_quant={bool(base.get('double_quant'))})"
    )


def _quoted(text: str) -> str:
    """A Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _footer(record: RunRecord) -> str:
    version = record.environment.get("versions", {}).get("fastpeft", "")
    name = " ".join(filter(None, ("fastpeft", str(version))))
    return f"<footer>Written by {escape(name)}. This page holds everything it shows.</footer>"
