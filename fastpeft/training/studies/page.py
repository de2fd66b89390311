"""report.html of a study: a single self-contained page like that of a run."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft.training.html_page import html_page, section, write_html
from fastpeft.training.plots import (
    Bar,
    Measured,
    Series,
    bar_chart,
    confusion_matrix,
    line_chart,
    scatter_chart,
    smooth,
    unit_chart,
)
from fastpeft.training.quantities import bytes_text, count_text, duration_text, short_count_text, value_text
from fastpeft.training.record import CLASSIFICATION
from fastpeft.training.run_folder import REPORT_FILE
from fastpeft.training.studies.comparison import BEST, Comparison, Pair, VariantResult
from fastpeft.training.studies.curves import mean_curve, mean_precision_recall, mean_roc

COLOURS = 8
_PAIRS_SHOWN = 60
_NAMES = {
    "accuracy": "Accuracy", "f1": "F1", "f1_macro": "F1, macro", "precision": "Precision", "recall": "Recall",
    "roc_auc": "ROC-AUC", "loss": "Loss", "perplexity": "Perplexity", "token_accuracy": "Token accuracy",
    "exact_match": "Exact match", "mcnemar": "right rows",
}  # fmt: skip
_SMOOTH_FROM = 30


def write_page(found: Comparison, summary: dict[str, Any], folder: Path) -> Path:
    """Write `folder`/report.html and return its path."""
    return write_html(render_page(found, summary), folder / REPORT_FILE)


def render_page(found: Comparison, summary: dict[str, Any]) -> str:
    """The page as text. Sections without data are left out."""
    ranked = found.ranked()
    shown = ranked[:COLOURS]
    return html_page(
        summary["title"],
        [
            _header(summary),
            _headline(found, ranked),
            section("Comparison", _quality(found, ranked)),
            section("Pairs", _pairs(found)),
            section("Quality against size", _scatter(found, shown)),
            section("Curves", _curves(found, shown)),
            section("Confusion matrices, all seeds", _confusions(found, shown)),
            section("Costs", _costs(ranked, shown)),
            section("Failed runs", _failed(found)),
            section("The study", _settings(found, summary)),
            "<footer>Written by fastpeft. This page holds everything it shows; results.csv has a row for every run, "
            "summary.json every number.</footer>",
        ],
    )


def _header(summary: dict[str, Any]) -> str:
    parts = [
        Path(summary["model"]).name,
        f"{len(summary['variants'])} variants",
        f"{count_text(summary['held_out_rows'])} held-out rows ({summary['held_out']})",
    ]
    return (
        f'<header>\n<p class="eyebrow">fastpeft study</p>\n<h1>{escape(summary["title"])}</h1>\n'
        f'<p class="subtitle">{escape("  ·  ".join(parts))}</p>\n</header>'
    )


def _headline(found: Comparison, ranked: Sequence[VariantResult]) -> str:
    runs = [result for variant in ranked for result in variant.runs]
    facts = []
    if ranked:
        first, interval = ranked[0], ranked[0].intervals[found.metric]
        more = f"{_NAMES[found.metric]} {interval.value:.3f}, {interval.low:.3f} to {interval.high:.3f}"
        facts.append(("Best on the held-out rows", first.label, more))
    if found.best is not None:
        best = found.best.run
        facts.append(
            (f"Kept in {BEST}/", best.variant.label, f"seed {best.seed}, chosen on the {found.chosen_on} rows")
        )
    failed = f"{len(found.failed)} failed" if found.failed else "none failed"
    facts.append(("Runs", count_text(len(runs) + len(found.failed)), failed))
    cpu = sum(result.record.cpu_seconds for result in runs)
    seconds = sum(result.record.seconds for result in runs)
    facts.append(("Time of all runs", duration_text(seconds), f"{duration_text(cpu)} of CPU time"))
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="facts">{shown}</dl>'


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return (
        '<div class="card scroll"><table class="table numbers compare"><thead><tr>'
        f"{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


# --- quality ----------------------------------------------------------------------------------------------------------


def _quality(found: Comparison, ranked: Sequence[VariantResult]) -> str:
    if not ranked:
        return ""
    names = [found.metric, *(name for name in ranked[0].intervals if name != found.metric)]
    rows = []
    for place, variant in enumerate(ranked):
        cells = "".join(_interval_cell(variant, name) for name in names)
        against = "" if place == 0 else _p_cell(found.pair(ranked[0].label, variant.label), found)
        rows.append(
            f'<tr{" class=first" if place == 0 else ""}><th scope="row">{escape(variant.label)}</th>{cells}'
            f"<td>{against}</td></tr>"
        )
    level = f"{100 * found.sureness.confidence:g} %"
    note = (
        f"Each metric is the mean over the seeds; under it its {level} bootstrap interval "
        f"({'BCa' if found.sureness.interval == 'bca' else 'percentile'}, {count_text(found.sureness.resamples)} draws of the "
        "held-out rows, every row in all of its seeds at once) and the standard deviation between seeds. The interval is about "
        "the rows, the deviation about the training. The last column is the chance of a difference from the first row at least "
        "this large if there were none, corrected for the number of pairs (Holm)."
    )
    head = ["", *(_NAMES[name] for name in names), "p, to the first"]
    return f'{_table(head, rows)}<p class="note">{escape(note)}</p>'


def _interval_cell(variant: VariantResult, name: str) -> str:
    interval, spread = variant.intervals.get(name), variant.spread.get(name, math.nan)
    if interval is None:
        return "<td></td>"
    between = f"<small>seeds ± {spread:.3f}</small>" if math.isfinite(spread) else ""
    return f"<td>{interval.value:.3f}<small>{interval.low:.3f} to {interval.high:.3f}</small>{between}</td>"


def _p_cell(pair: Pair | None, found: Comparison) -> str:
    corrected = math.nan if pair is None else pair.corrected.get(found.test, math.nan)
    return _p_text(corrected, 1 - found.sureness.confidence)


def _p_text(p: float, level: float) -> str:
    if not math.isfinite(p):
        return ""
    text = "&lt; 0.001" if p < 0.001 else f"{p:.3f}"
    return f'<span class="sure">{text}</span>' if p <= level else text


def _pairs(found: Comparison) -> str:
    if not found.pairs:
        return ""
    tests = list(found.pairs[0].p)
    if found.test in tests:
        tests = [found.test, *(test for test in tests if test != found.test)]
    level = 1 - found.sureness.confidence
    ordered = sorted(found.pairs, key=lambda pair: pair.p.get(found.test, 1.0))
    rows = []
    for pair in ordered[:_PAIRS_SHOWN]:
        cells = "".join(
            f"<td>{_signed(pair.difference.get(test, math.nan))}<small>p {_p_text(pair.corrected.get(test, math.nan), level)}"
            "</small></td>"
            for test in tests
        )
        apart = f"<td>{pair.discordant[0]} : {pair.discordant[1]}</td>"
        rows.append(
            f'<tr><th scope="row">{escape(pair.first)} − {escape(pair.second)}<small>{len(pair.seeds)} seeds</small></th>'
            f"{cells}{apart}</tr>"
        )
    left_out = len(found.pairs) - len(rows)
    note = (
        "Difference of the means over the seeds that both have, and its two-sided p, corrected over all pairs (Holm). Right "
        "rows: McNemar's exact test, with several seeds the sign test on the number of seeds that have a row right; apart: rows "
        "that the first, and the second, has right more often. The others: paired permutation, rows exchanged between the two in "
        f"all seeds at once, {count_text(found.sureness.resamples)} draws."
        + (f" {left_out} pairs with a larger p are in summary.json." if left_out else "")
    )
    return f'{_table(["", *(_NAMES[test] for test in tests), "apart"], rows)}<p class="note">{escape(note)}</p>'


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if math.isfinite(value) else ""


def _scatter(found: Comparison, shown: Sequence[VariantResult]) -> str:
    points = []
    for index, variant in enumerate(shown):
        interval = variant.intervals[found.metric]
        points.append(
            Measured(
                variant.label,
                variant.cost("trainable_parameters"),
                interval.value,
                interval.low,
                interval.high,
                _colour(index),
            )
        )
    chart = scatter_chart(
        points,
        title=f"{_NAMES[found.metric]} and its interval",
        x_label="trained parameters",
        x_format=lambda number: short_count_text(round(number)),
    )
    sizes = [
        Bar(v.label, v.cost("adapter_bytes"), bytes_text(v.cost("adapter_bytes")), _colour(i))
        for i, v in enumerate(shown)
    ]
    return f'<div class="grid">{chart}{bar_chart(sizes, title="Adapter on disk")}</div>' if chart else ""


def _colour(index: int) -> str:
    return f"series v{index % COLOURS}"


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves(found: Comparison, shown: Sequence[VariantResult]) -> str:
    charts = []
    training, validation = [], []
    for index, variant in enumerate(shown):
        histories = [result.record.history for result in variant.runs]
        loss = mean_curve(histories, "loss")
        training.append(Series(variant.label, smooth(loss) if len(loss) >= _SMOOTH_FROM else loss, _colour(index)))
        validation.append(Series(variant.label, mean_curve(histories, "eval_loss"), _colour(index), marked=True))
    charts.append(line_chart(training, title="Training loss", x_label="step"))
    charts.append(line_chart(validation, title="Validation loss", x_label="step"))
    if found.task == CLASSIFICATION:
        roc, recall = [], []
        for index, variant in enumerate(shown):
            rows = [result.rows for result in variant.runs]
            for kind, series, name in ((mean_roc, roc, "AUC"), (mean_precision_recall, recall, "AP")):
                curve = kind(rows)
                if curve is not None:
                    series.append(Series(f"{variant.label}, {name} {curve.area:.3f}", curve.points, _colour(index)))
        charts.append(
            unit_chart(roc, title="ROC", x_label="false positive rate", y_label="true positive rate", diagonal=True)
        )
        charts.append(unit_chart(recall, title="Precision and recall", x_label="recall", y_label="precision"))
    drawn = "".join(charts)
    note = '<p class="note">Means over the seeds, of the eight best variants at most.</p>'
    return f'<div class="grid">{drawn}</div>{note}' if drawn else ""


def _confusions(found: Comparison, shown: Sequence[VariantResult]) -> str:
    figures = []
    for variant in shown:
        matrices = [result.record.confusion for result in variant.runs if result.record.confusion]
        if found.task == CLASSIFICATION and matrices:
            table = confusion_matrix(variant.runs[0].record.labels, np.sum(matrices, axis=0).tolist())
            figures.append(f"<figure><figcaption><b>{escape(variant.label)}</b></figcaption>{table}</figure>")
    return f'<div class="grid small">{"".join(figures)}</div>' if figures else ""


# --- costs ------------------------------------------------------------------------------------------------------------


def _costs(ranked: Sequence[VariantResult], shown: Sequence[VariantResult]) -> str:
    if not ranked:
        return ""
    kinds = (
        ("peak_memory_mb", "Peak memory", lambda v: bytes_text(v * 1e6)),
        ("seconds", "Wall-clock time of a run", duration_text),
        ("cpu_seconds", "CPU time of a run", duration_text),
        ("tokens_per_second", "Training, tokens per second", lambda v: count_text(round(v))),
    )
    charts = "".join(
        bar_chart(
            [Bar(v.label, v.cost(name), text(v.cost(name)), _colour(i)) for i, v in enumerate(shown)], title=title
        )
        for name, title, text in kinds
    )
    rows = [
        f'<tr><th scope="row">{escape(v.label)}</th><td>{count_text(round(v.cost("trainable_parameters")))}</td>'
        f"<td>{100 * v.cost('trainable_parameters') / max(v.cost('total_parameters'), 1):.2f} %</td>"
        f"<td>{bytes_text(v.cost('adapter_bytes'))}</td>"
        + "".join(f"<td>{escape(text(v.cost(name)))}</td>" for name, _, text in kinds)
        + "</tr>"
        for v in ranked
    ]
    head = ["", "Trained parameters", "of all", "Adapter", "Peak memory", "Wall clock", "CPU time", "Tokens/s"]
    note = (
        '<p class="note">Means over the seeds. On a CPU memory is what is resident in the process, with the base model and what '
        "the libraries take; a resumed run's time is that since its last start.</p>"
    )
    return f'<div class="grid">{charts}</div><br>{_table(head, rows)}{note}'


def _failed(found: Comparison) -> str:
    rows = [
        f'<tr><th scope="row">{escape(run.name)}</th><td>{escape(run.error() or "not finished")}</td></tr>'
        for run in found.failed
    ]
    return f'<div class="card"><table class="table"><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""


def _settings(found: Comparison, summary: dict[str, Any]) -> str:
    about = {
        "model": summary["model"],
        "data": summary["data"],
        "SHA-256 of the rows": summary["data_hash"],
        "metric": found.metric,
    }
    options = {variant.label: variant.options for variant in found.variants}
    cards = [("Data", about), ("Variants", options)]
    if found.best is not None:
        machine = found.best.record.environment
        cards.append(("Machine", {key: value for key, value in machine.items() if key != "versions"}))
        cards.append(("Versions", machine.get("versions", {})))
    drawn = "".join(
        f'<div class="card"><h3>{escape(title)}</h3><table class="table"><tbody>{_pairs_of(values)}</tbody></table></div>'
        for title, values in cards
        if values
    )
    return f'<div class="grid">{drawn}</div>'


def _pairs_of(values: dict[str, Any]) -> str:
    return "".join(
        f'<tr><th scope="row">{escape(str(key).replace("_", " "))}</th><td>{escape(value_text(value))}</td></tr>'
        for key, value in values.items()
    )
