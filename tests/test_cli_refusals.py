"""What the command line refuses: one line with the reason, exit code 2, nothing written and nothing lost."""

import pickle
import shutil
import tempfile

import pytest
from safetensors.torch import load_file, save_file

from fastpeft.cli import main
from fastpeft.training import engine, run_folder
from tests.training import tiny
from tests.training.commands import fails, train_command

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tiny models and data."""
    folder = tmp_path_factory.mktemp("refusals")
    tiny.bert(folder / "bert")
    tiny.bert(folder / "bert3", layers=3)
    tiny.llama(folder / "llama")
    tiny.write_jsonl(folder / "reviews.jsonl", tiny.reviews(40))
    tiny.write_csv(folder / "questions.csv", tiny.questions(40))
    return folder


@pytest.fixture(scope="module")
def classifier(files):
    """An adapter of the tiny BERT."""
    output = files / "classifier"
    assert main(train_command(files, "bert", "reviews.jsonl", output, "--max-steps", 1, "--no-report")) == 0
    return output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--data", "{files}/none.csv"), "data file"),
        (("--data", "{files}/bert"), "expected a saved dataset, or train"),
        (("--test-data", "{files}/none.csv"), "no such file"),
        (("--text-column", "words"), "text column: expected one of ['text', 'label'], got 'words'"),
        (
            ("--labels", "negative", "other"),
            "label 'positive' is outside the range; expected one of ['negative', 'other']",
        ),
        (("--model", "{files}/nothing"), "expected a folder of a transformers model"),
        (("--model", "{files}"), "expected a folder with config.json"),
        (("--target-modules", "qury"), "'query'"),
        (("--r", "0"), "r=0"),
        (("--lora-dropout", "1.5"), "lora_dropout"),
        (("--max-length", "65"), "max_length: expected at most the model's 64 positions, got 65"),
        (("--learning-rate", "-1"), "learning_rate: expected more than 0"),
        (("--metric-for-best-model", "bleu"), "metric_for_best_model: expected one of ('accuracy', 'loss'"),
        (("--optim", "adam"), "not a valid OptimizerNames"),
        (("--resume",), "no complete checkpoint"),
        (("--output-dir", "{files}/reviews.jsonl/out"), "is a file"),
        (("--output-dir", "{files}/reviews.jsonl"), "expected a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(files, tmp_path, capsys, options, reason):
    before = sorted(files.iterdir())
    options = [option.format(files=files) for option in options]
    fails(capsys, train_command(files, "bert", "reviews.jsonl", tmp_path / "out", *options), reason)
    assert not (tmp_path / "out").exists()
    assert sorted(files.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_found_before_training(files, tmp_path, capsys, monkeypatch):
    """A read-only folder. Root may write anywhere, so the system's refusal is put in place of the file that is tried."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(engine, "read_training_data", lambda *_, **__: pytest.fail("read the data first"))
    fails(capsys, train_command(files, "bert", "reviews.jsonl", tmp_path / "out"), "cannot write in")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_not_overwritten_and_outlives_a_failed_run(files, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    command = train_command(files, "llama", "questions.csv", output, "--max-steps", 2, "--examples", 0, "--no-report")
    assert main(command) == 0
    before = (output / TENSORS).read_bytes()
    fails(capsys, command, "holds a run already")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "train", fail)
        fails(capsys, [*command, "--overwrite", "--seed", "1"], "No space left")
    assert (output / TENSORS).read_bytes() == before
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    assert (output / TENSORS).read_bytes() != before
    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*command, "--overwrite"]) == 130


def _damaged(whole, folder, damage):
    """A copy of the adapter with one thing wrong."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoints"))
    tensors = folder / TENSORS
    if damage == "pickle":
        tensors.unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "no config":
        (folder / "adapter_config.json").unlink()
    elif damage == "side file":
        (folder / run_folder.INFO_FILE).write_text("{", encoding="utf-8")
    elif damage == "wrong shape":
        loaded = load_file(tensors)
        save_file({name: tensor[:1].clone() for name, tensor in loaded.items()}, tensors)
    return folder


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("pickle", "is a pickle"),
        ("truncated", "truncated"),
        ("missing", TENSORS),
        ("no config", "adapter_config.json"),
        ("side file", run_folder.INFO_FILE),
        ("wrong shape", "wrong shape"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "predict", "merge"])
def test_a_damaged_adapter_is_refused(files, classifier, tmp_path, capsys, damage, reason, command):
    adapter = _damaged(classifier, tmp_path / "adapter", damage)
    more = {
        "evaluate": ["--data", files / "reviews.jsonl"],
        "predict": ["--input", files / "reviews.jsonl", "--output", tmp_path / "out.jsonl"],
        "merge": ["--output-dir", tmp_path / "out"],
    }
    fails(capsys, [command, "--adapter", adapter, *more[command]], reason)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_another_model_is_refused(files, classifier, capsys):
    command = ["evaluate", "--adapter", classifier, "--data", files / "reviews.jsonl", "--model"]
    fails(capsys, [*command, files / "llama"], "query")
    fails(capsys, [*command, files / "bert3"], "missing: base_model.model.bert.encoder.layer.2")
    fails(capsys, [*command, files / "nothing"], "expected a folder of a transformers model")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["fly"], "expected a command, one of ['train',"),
        (["predict", "--adapter", "x"], "expected either texts or --input"),
        (["inspect"], "expected --adapter or --model"),
        (["evaluate", "--adapter", "nothing", "--data", "nothing.csv"], "nothing.csv"),
        (["inspect", "--adapter", "nothing"], "nothing"),
    ],
)
def test_other_bad_commands(arguments, reason, capsys):
    fails(capsys, arguments, reason)


def test_unknown_options_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--modle", "x"])
    assert stop.value.code == 2
    assert "--modle" in capsys.readouterr().err
    assert main([]) == 2


def test_a_fault_of_the_program_is_not_disguised_and_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setattr(engine, "train", lambda config: {}["missing"])
    command = ["train", "--model", "m", "--data", "d", "--output-dir", "o"]
    with pytest.raises(KeyError):
        main(command)
    fails(capsys, ["evaluate", "--adapter", "a", "--data", "nothing.csv", "--debug"], "nothing.csv")
    main(["evaluate", "--adapter", "a", "--data", "nothing.csv", "--debug"])
    assert "Traceback" in capsys.readouterr().err
