"""What study.yaml may say, the variants that come of it, and the searches."""

import json
import sys
import types

import numpy as np
import pytest

from fastpeft import study
from fastpeft.training.studies.search import corners, variants
from fastpeft.training.studies.spec import Range, read_study
from tests.training.study_cases import BASE, reviews, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("study"))


def labels(files, **more):
    return [variant.label for variant in variants(read_study(reviews(files, **more)))]


def test_a_grid_gives_every_method_the_options_that_it_has(files):
    found = labels(files, methods=["lora", "ia3"], grid={"r": [4, 8], "learning_rate": [1e-3, 1e-2]}, base={})
    assert found == [
        "lora · r 4 · lr 0.001", "lora · r 4 · lr 0.01", "lora · r 8 · lr 0.001", "lora · r 8 · lr 0.01",
        "ia3 · lr 0.001", "ia3 · lr 0.01",
    ]  # fmt: skip
    own = [{"method": "lora", "r": 2}, {"method": "dora", "grid": {"r": [1, 3]}}]
    assert labels(files, methods=own, grid={"r": [4, 8]}) == ["lora", "dora · r 1", "dora · r 3"]
    twice = [{"method": "lora", "r": 2}, {"method": "lora", "r": 4}]
    assert labels(files, methods=twice) == ["lora · r 2", "lora · r 4"]
    targets = labels(files, methods=["lora"], grid={"target_modules": [["query"], ["query", "value"]]})
    assert targets == ["lora · on query", "lora · on query+value"]
    assert labels(files, methods=["lora"], grid={"r": [4, 4]}) == ["lora · r 4"]


def test_a_random_search_draws_by_its_seed(files):
    more = {"grid": {"r": [1, 2, 3, 4], "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}}
    more["search"] = {"kind": "random", "trials": 5}
    found = variants(read_study(reviews(files, **more)))
    assert len({variant.key() for variant in found}) == 5
    assert found == variants(read_study(reviews(files, **more)))
    rates = [variant.options["learning_rate"] for variant in found]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    more["search"] = {"kind": "random", "trials": 5, "seed": 1}
    assert found != variants(read_study(reviews(files, **more)))
    lists = {"grid": {"r": [1, 2, 3, 4]}, "methods": ["lora"], "search": {"kind": "random", "trials": 9}}
    assert sorted(labels(files, **lists)) == [f"lora · r {r}" for r in (1, 2, 3, 4)]


def test_numbers_of_yaml_are_numbers(files, tmp_path):
    text = f"model: {files / 'bert'}\ndata: {files / 'reviews'}\nmethods: [lora]\nbase: {{learning_rate: 5e-3}}\n"
    (tmp_path / "study.yaml").write_text(
        text + "grid:\n  weight_decay: {low: 1e-4, high: 1e-1}\n" + "search: {kind: random}\n"
    )
    spec = read_study(tmp_path / "study.yaml")
    assert spec.methods[0].fixed == {"learning_rate": 0.005}
    assert spec.methods[0].axes == {"weight_decay": Range(1e-4, 1e-1)}
    assert spec.seeds == [0]
    (tmp_path / "study.json").write_text(json.dumps(reviews(files)))
    assert read_study(tmp_path / "study.json") == read_study(reviews(files))


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"modle": 1}, ValueError, r"study: .*modle -> \['model'\]"),
        ({"model": None}, ValueError, r"expected \['model'\]"),
        ({"methods": None}, ValueError, "got neither"),
        ({"grid": {"method": ["lora"]}}, ValueError, "got both"),
        ({"methods": ["lroa"]}, ValueError, r"lroa -> \['lora'"),
        ({"methods": [{"method": "lora", "rr": 1}]}, ValueError, r"methods, lora: .*\['rr'\]"),
        ({"methods": [3]}, TypeError, "a name, or a mapping with method, got 3"),
        ({"base": {"lerning_rate": 1}}, ValueError, r"base: .*lerning_rate -> \['learning_rate'"),
        ({"grid": {"r": 4}}, TypeError, "grid, r: expected a list of values"),
        ({"grid": {"banana": [4]}}, ValueError, "grid: .*'banana'"),
        ({"grid": {"seed": [1, 1]}}, ValueError, "different seeds"),
        ({"grid": {"seed": ["a"]}}, ValueError, "whole numbers"),
        ({"grid": {"text_column": ["a", "b"]}}, ValueError, "decide which rows are held out"),
        ({"base": {"output_dir": "x"}}, ValueError, r"sets \['output_dir'\] itself"),
        ({"grid": {"r": {"low": 1, "high": 4}}}, ValueError, "random or optuna"),
        ({"grid": {"r": {"low": 4, "high": 1}}}, ValueError, "low < high"),
        ({"search": {"kind": "genetic"}}, ValueError, "one of .*optuna"),
        ({"search": {"kind": "random", "trials": 0}}, ValueError, "trials"),
        ({"statistics": {"resamples": 3}}, ValueError, "resamples"),
        ({"statistics": {"alpha": 3}}, ValueError, "alpha"),
        ({"metric": "bleu"}, ValueError, "metric: expected one of .*got 'bleu'"),
        ({"methods": [{"method": "lora", "r": 0}]}, ValueError, "study, lora: .*r=0"),
        ({"methods": [{"method": "lora", "target_modules": ["qury"]}]}, ValueError, "study, lora: .*qury"),
        ({"methods": [{"method": "lora", "name": "x"}, {"method": "ia3", "name": "x"}]}, ValueError, "both called 'x'"),
        ({"data": "nowhere"}, OSError, "nowhere"),
        ({"model": "/nowhere/at/all"}, OSError, "nowhere"),
        ({"base": {"report_to": ["comet"]}}, ValueError, "report_to: expected a list of names from .*tensorboard"),
    ],
)
def test_a_study_is_checked_before_anything_starts(files, tmp_path, more, error, said):
    with pytest.raises(error, match=said):
        study(reviews(files, **more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_held_out_rows(files, tmp_path):
    more = {"data": str(files / "reviews/train.jsonl"), "base": BASE | {"validation_fraction": 0.0}}
    with pytest.raises(ValueError, match="expected held-out rows"):
        study(reviews(files, **more), tmp_path / "out")
    with pytest.raises(ValueError, match="jobs of at least 1"):
        study(reviews(files), tmp_path / "out", jobs=0)


# ---- optuna ----------------------------------------------------------------------------------------------------------


def test_optuna_is_named_where_it_is_missing(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"optuna is not installed; pip install 'fastpeft\[study\]'"):
        study(reviews(files, search={"kind": "optuna"}), tmp_path / "out")


class Sampler:
    """Stands for optuna's TPESampler: draws by a seed."""

    def __init__(self, seed):
        self.draw = np.random.default_rng(seed)


class Trial:
    def __init__(self, draw):
        self.draw = draw

    def suggest_categorical(self, name, choices):
        return choices[int(self.draw.integers(len(choices)))]

    def suggest_int(self, name, low, high, log=False):
        return int(self.draw.integers(low, high + 1))

    def suggest_float(self, name, low, high, log=False):
        return float(self.draw.uniform(low, high))


class Told:
    """Stands for optuna's Study, and remembers what it is told."""

    def __init__(self, direction, sampler):
        self.direction, self.draw, self.values = direction, sampler.draw, []

    def ask(self):
        return Trial(self.draw)

    def tell(self, trial, value=None, state=None):
        self.values.append(state if value is None else value)


def test_optuna_asks_and_is_told(files, tmp_path, monkeypatch):
    """Of a stand-in with the functions that are used; asked again it asks for the same, whose runs are there."""
    studies = []
    optuna = types.SimpleNamespace(
        logging=types.SimpleNamespace(set_verbosity=lambda level: None, WARNING=30),
        samplers=types.SimpleNamespace(TPESampler=Sampler),
        trial=types.SimpleNamespace(TrialState=types.SimpleNamespace(FAIL="fail")),
        create_study=lambda **options: studies.append(Told(**options)) or studies[-1],
    )
    monkeypatch.setitem(sys.modules, "optuna", optuna)
    more = {"grid": {"r": {"low": 1, "high": 4}, "target_modules": [["query"], ["value"]], "seed": [0, 1]}}
    more |= {"search": {"kind": "optuna", "trials": 3}, "base": BASE | {"max_steps": 1}, "metric": "loss"}
    found = study(reviews(files, **more), tmp_path)
    assert studies[0].direction == "minimize"
    assert len(studies[0].values) == 3
    assert min(studies[0].values) < 2.0
    again = study(reviews(files, **more), tmp_path)
    assert again.trained == 0
    assert again.summary == found.summary
    spec = read_study(reviews(files, **more))
    assert {variant.options.get("r") for variant in corners(spec)} == {1, 4, None}


def test_a_study_s_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"study: expected a \.yaml or \.json file, got .*nope\.yaml: no such file"
    ):
        read_study(tmp_path / "nope.yaml")
