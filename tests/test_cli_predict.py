"""fastpeft predict over a file: it grows by batches, goes on after its last complete row, and only with the same work."""

import json
import shutil

import pytest

from fastpeft.cli import main
from fastpeft.training.predict import TrainedAdapter
from tests.serving.tiny_server import LABELS, lora, save_adapter
from tests.tolerance import METRICS_REPEATED
from tests.training import tiny
from tests.training.commands import fails, result

ROWS = 30


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    llama, bert = tiny.llama(folder / "llama"), tiny.bert(folder / "bert")
    save_adapter(folder / "generate", llama, lora(1), 1)
    save_adapter(folder / "generate2", llama, lora(1), 2)
    save_adapter(folder / "classify", bert, lora(1, target_modules=["query", "value"]), 1, LABELS)
    tiny.write_jsonl(folder / "generate.jsonl", tiny.questions(ROWS))
    tiny.write_jsonl(folder / "generate2.jsonl", tiny.questions(ROWS, seed=1))
    tiny.write_jsonl(folder / "classify.jsonl", tiny.reviews(ROWS))
    return folder


def command(files, task, output, *more, rows=None, adapter=None):
    flags = ["--adapter", files / (adapter or task), "--input", files / f"{rows or task}.jsonl", "--output", output]
    sizes = {"generate": 4, "classify": 1}  # of a batch; eight of classify's are written at once
    return [str(part) for part in ["predict", *flags, "--batch-size", sizes[task], "--max-new-tokens", 3, *more]]


def cut_off_after(monkeypatch, task, calls):
    """The program is interrupted when it wants to compute once more than `calls` times."""
    whole, count = getattr(TrainedAdapter, task), []

    def interrupted(self, *args, **kwargs):
        count.append(1)
        if len(count) > calls:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(TrainedAdapter, task, interrupted)
    return count


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("task", "after_two"), [("generate", 8), ("classify", 16)])
@pytest.mark.parametrize("torn", [False, True], ids=["whole rows", "a torn row"])
def test_it_goes_on_after_the_last_complete_row(files, tmp_path, monkeypatch, capsys, task, after_two, torn):
    assert main(command(files, task, tmp_path / "whole.jsonl")) == 0
    assert result(capsys)["resumed_after"] == 0
    output = tmp_path / "cut.jsonl"
    with monkeypatch.context() as patch:
        cut_off_after(patch, task, 2)
        assert main(command(files, task, output)) == 130
    assert len(lines(output)) == after_two
    kept = after_two
    if torn:
        output.write_bytes(output.read_bytes()[:-3])
        kept -= 1
    with monkeypatch.context() as patch:
        calls = cut_off_after(patch, task, 1000)
        assert main(command(files, task, output)) == 0
        size = {"generate": 4, "classify": 8}[task]
        assert len(calls) == -(-(ROWS - kept) // size), "rows were computed again"
    done = result(capsys)
    assert (done["rows"], done["resumed_after"]) == (ROWS, kept)
    whole, resumed = lines(tmp_path / "whole.jsonl"), lines(output)
    assert [(row["prediction"], list(row)) for row in resumed] == [(row["prediction"], list(row)) for row in whole]
    if task == "classify":
        pairs = zip(whole, resumed, strict=True)
        assert max(abs(one["probability"] - two["probability"]) for one, two in pairs) < METRICS_REPEATED
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "cut.jsonl"}
    fails(capsys, command(files, task, output), "the file exists")


def test_other_work_is_refused_and_the_rows_stay(files, tmp_path, monkeypatch, capsys):
    output = tmp_path / "cut.jsonl"
    with monkeypatch.context() as patch:
        cut_off_after(patch, "generate", 1)
        assert main(command(files, "generate", output)) == 130
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = {
        "input": {"rows": "generate2"},
        "adapter": {"adapter": "generate2"},
        "max_new_tokens": {"more": ["--max-new-tokens", 2]},
        "base model": {"more": ["--model", files / "copy"]},
    }
    shutil.copytree(files / "llama", files / "copy")
    for name, options in changed.items():
        more = options.pop("more", [])
        fails(capsys, command(files, "generate", output, *more, **options), f"was begun with another {name}; finish it")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main(command(files, "generate", output, "--overwrite", rows="generate2")) == 0
    assert [row["prompt"] for row in lines(output)] == [row["prompt"] for row in tiny.questions(ROWS, seed=1)]


def test_a_damaged_note_is_refused(files, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("{}\n")
    (tmp_path / "out.jsonl.unfinished.json").write_text("{")
    fails(capsys, command(files, "generate", output), "expected what fastpeft predict writes")
    assert output.read_text() == "{}\n"
