"""--method: the flags are those of the method, and every command works for adapters of any method."""

import dataclasses
import json
import re
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastpeft import LoraConfig
from fastpeft.cli import main
from fastpeft.cli.inspect import InspectConfig
from fastpeft.cli.method_options import chosen_method, plain, single_pattern, with_method
from fastpeft.methods import METHODS
from fastpeft.methods.by_name import method_names, named_method, register_method
from fastpeft.training import RunRecord, TrainConfig, TrainedAdapter, engine
from tests.methods import gain
from tests.tolerance import MERGED_EQUALS_UNMERGED, METRICS_REPEATED, assert_close
from tests.training import tiny
from tests.training.commands import fails, result, train_command

LENGTH = {"num_virtual_tokens": 4}
NEEDED = {
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"), LENGTH),
    "FUSION": {"adapters": ["one", "two"]},
    "ADALORA": {"total_step": 100},
}
"""Options that a method cannot do without, by peft_type."""


@pytest.fixture
def method():
    with gain.registered() as module:
        yield module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    tiny.llama(folder / "llama")
    tiny.bert(folder / "bert")
    tiny.write_jsonl(folder / "reviews.jsonl", tiny.reviews(40))
    tiny.write_csv(folder / "questions.csv", tiny.questions(40))
    return folder


def shown_flags(capsys, *command: str) -> set[str]:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    return set(re.findall(r"--([a-z0-9][a-z0-9-]*)", capsys.readouterr().out.lower())) - {"help"}


def flag(name: str) -> str:
    return name.lower().replace("_", "-")


def is_text(item: dataclasses.Field) -> bool:
    """False for a field whose values have no form as text: a mapping to anything, or LoRA's eva_config."""
    return "Any" not in str(item.type) and item.name != "eva_config"


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("command", ["train", "inspect"])
def test_help_shows_exactly_the_methods_options(command, name, capsys):
    own = {flag(item.name) for item in dataclasses.fields(TrainConfig if command == "train" else InspectConfig)} - {
        "peft"
    }
    of_method = {flag(item.name) for item in dataclasses.fields(named_method(name).config_class) if is_text(item)}
    shown = shown_flags(capsys, command, "--method", name)
    twice = own & of_method
    expected = own | {f"peft-{item}" if item in twice else item for item in of_method} | {"method"}
    assert {item for item in shown if not item.startswith("no-")} == expected


def test_without_a_method_it_is_lora(capsys):
    assert shown_flags(capsys, "train") == shown_flags(capsys, "train", "--method=LoRA")


def seen_config(monkeypatch, *options: str) -> TrainConfig:
    seen = []
    monkeypatch.setattr(engine, "train", lambda config: seen.append(config) or RunRecord("t", "causal_lm", "m"))
    assert main(["train", "--model", "m", "--data", "d", "--output-dir", "o", *options]) == 0
    assert type(seen[0]) is TrainConfig
    return seen[0]


def test_names_bring_their_own_defaults(monkeypatch):
    config = seen_config(monkeypatch, "--method", "qlora", "--r", "4")
    assert (config.quantization, config.peft) == ("nf4", LoraConfig(r=4))
    assert type(config.peft) is LoraConfig
    assert seen_config(monkeypatch, "--method", "qlora", "--quantization", "fp4").quantization == "fp4"
    assert seen_config(monkeypatch, "--method", "dora").peft == LoraConfig(use_dora=True)
    assert seen_config(monkeypatch, "--method", "dora", "--no-use-dora").peft == LoraConfig()
    assert seen_config(monkeypatch) == TrainConfig(model="m", data="d", output_dir="o")


def test_flags_of_a_method_of_another_package_arrive(method, monkeypatch):
    config = seen_config(monkeypatch, "--method", "gain", "--limit", "0.25", "--target-modules", "all-linear")
    assert config.peft == method.GainConfig(limit=0.25, target_modules="all-linear")


@pytest.mark.parametrize("name", method_names())
def test_every_methods_defaults_are_those_of_its_config(name):
    """What no flag changes is what get_peft_config gives, also where a config has lists or mappings."""
    import tyro

    named = named_method(name)
    needed = NEEDED.get(named.peft_type, {})
    given = [
        str(part)
        for key, value in needed.items()
        for part in (f"--{flag(key)}", *(value if isinstance(value, list) else [value]))
    ]
    arguments = ["--model", "m", "--data", "d", "--output-dir", "o", *given]
    parsed = tyro.cli(with_method(TrainConfig, name), args=arguments, config=(tyro.conf.OmitArgPrefixes,))
    assert plain(parsed, TrainConfig, name).peft == named.config_class(**named.options, **needed)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--method", "lroa"], "did you mean lroa -> ['lora'"),
        (["--method"], "--method: expected one of ["),
        (["--method", "--r"], "--method: expected one of ["),
        (["--method", "gain", "--limit", "-1"], "GainConfig: expected limit more than 0, got -1.0"),
    ],
    ids=["unknown", "none", "a_flag", "its_own_check"],
)
def test_what_is_wrong_with_a_method(method, options, reason, capsys):
    fails(capsys, ["train", "--model", "m", "--data", "d", "--output-dir", "o", *options], reason)


def test_an_option_of_another_method_is_unknown(method, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", "m", "--data", "d", "--output-dir", "o", "--method", "gain", "--lora-alpha", "3"])
    assert stop.value.code == 2
    assert "--lora-alpha" in capsys.readouterr().err


def test_the_last_method_counts_and_values_of_other_flags_do_not():
    assert chosen_method(["--title", "x", "--method=dora", "--method", "rslora"]) == "rslora"
    assert chosen_method(["--title", "method"]) == "lora"


def test_one_flag_never_means_two_things(method, monkeypatch, capsys):
    """A method with a field that a run has too, here seed and labels: --seed is the run's, --peft-seed the method's."""

    @register_method
    @dataclass
    class SeededConfig(method.GainConfig):
        """With a seed of its own."""

        peft_type = "SEEDED"
        seed: int = 7
        """Seed of the method."""

    flags = shown_flags(capsys, "train", "--method", "seeded")
    assert {"seed", "peft-seed"} <= flags
    config = seen_config(monkeypatch, "--method", "seeded", "--seed", "1", "--peft-seed", "2")
    assert (config.seed, config.peft.seed, type(config.peft)) == (1, 2, SeededConfig)
    config = seen_config(monkeypatch, "--method", "seeded", "--seed", "1")
    assert (config.seed, config.peft.seed) == (1, 7)


def test_no_method_of_the_library_clashes_today():
    """A new one may, and gets --peft-NAME: that is to be seen here, not found by a user."""
    of_training = {item.name for item in dataclasses.fields(TrainConfig)}
    clashes = {kind: sorted(of_training & {item.name for item in dataclasses.fields(c)}) for kind, c in METHODS.items()}
    assert {kind: names for kind, names in clashes.items() if names} == {}


def test_single_patterns():
    assert single_pattern(LoraConfig(target_modules=["all-linear"])).target_modules == "all-linear"
    assert single_pattern(LoraConfig(target_modules=["q_proj"], exclude_modules=[".*1.*"])).exclude_modules == ".*1.*"
    assert single_pattern(LoraConfig(modules_to_save=["a+"])).modules_to_save == ["a+"]


# -- every command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "data"), [("llama", "questions.csv"), ("bert", "reviews.jsonl")])
def test_train_evaluate_predict_inspect_merge(method, files, model, data, tmp_path, capsys):
    out = tmp_path / "out"
    options = (
        "--method",
        "gain",
        "--target-modules",
        "all-linear",
        "--num-train-epochs",
        2,
        "--test-data",
        files / data,
    )
    assert main(train_command(files, model, data, out, *options, "--learning-rate", 0.05, "--max-new-tokens", 2)) == 0
    trained = result(capsys)
    record = RunRecord.load(out / "run.json")
    assert record.peft_config["peft_type"] == record.training["peft"]["peft_type"] == "GAIN"
    assert record.title == f"{model}: GAIN for {record.task}"
    assert "GAIN" in (out / "report.html").read_text(encoding="utf-8")
    assert record.metrics["loss"] < record.baseline["loss"]
    assert main(["evaluate", "--adapter", str(out), "--data", str(files / data), "--use-cpu"]) == 0
    found = result(capsys)
    assert {name: found[name] for name in record.metrics} == pytest.approx(record.metrics, rel=METRICS_REPEATED)
    assert main(["predict", "w1 w2", "--adapter", str(out), "--max-new-tokens", "2"]) == 0
    assert "prediction" in json.loads(capsys.readouterr().out.splitlines()[0])
    assert main(["inspect", "--adapter", str(out)]) == 0
    assert result(capsys)["parameters"] == trained["trainable_parameters"]
    if model == "llama":
        command = ["inspect", "--model", files / model, "--method", "gain", "--target-modules", "all-linear"]
        assert main([str(part) for part in command]) == 0
        assert result(capsys)["trainable_parameters"] == trained["trainable_parameters"]
        assert main(["merge", "--adapter", str(out), "--output-dir", str(tmp_path / "merged")]) == 0
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            expected = TrainedAdapter.load(out, use_cpu=True).model(input_ids=ids).logits
            got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
        assert_close("logits", got, expected, MERGED_EQUALS_UNMERGED)


def test_what_has_no_merged_form_is_said_in_one_line(method, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(method.GainLinear, "mergeable", False)
    out = tmp_path / "out"
    assert (
        main(train_command(files, "llama", "questions.csv", out, "--method", "gain", "--max-steps", 1, "--no-report"))
        == 0
    )
    fails(
        capsys, ["merge", "--adapter", out, "--output-dir", tmp_path / "merged"], "GainLinear computes what no weight"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_of_a_method_that_is_not_there(method, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(train_command(files, "llama", "questions.csv", out, "--method", "gain", "--max-steps", 1, "--no-report"))
        == 0
    )
    del METHODS["GAIN"]
    fails(capsys, ["evaluate", "--adapter", out, "--data", files / "questions.csv"], "peft_type 'GAIN' is not one of")
