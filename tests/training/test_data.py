"""Reading rows: every format gives the same rows, and what is wrong is named in one line."""

import json

import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fastpeft.training.config import DataConfig
from fastpeft.training.data import choose_columns, class_names, read_splits, read_table, split_off_validation
from fastpeft.training.labels import label_index, label_names
from fastpeft.training.prepare import guess_task, read_training_data
from tests.training import tiny

ROWS = [
    {"text": 'a, "quoted"\nline', "label": "good"},
    {"text": "ünï", "label": "bad"},
    {"text": "42", "label": "good"},
]


def _write(path, rows):
    if path.suffix in (".jsonl", ".ndjson"):
        tiny.write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(Dataset.from_list(rows).data.table, path)
    else:
        tiny.write_csv(path, rows, delimiter="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    assert list(read_table(_write(tmp_path / f"rows{suffix}", ROWS))) == ROWS


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b", "other": 1}\n')
    assert list(read_table(path)) == [{"text": "a", "other": None}, {"text": "b", "other": 1}]


def test_mixed_plain_types_of_a_column_become_text(tmp_path):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"label": 1}, {"label": "two"}, {"label": None}])
    assert read_table(path)["label"][:] == ["1", "two", None]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": \n', "rows.jsonl, line 2: expected a JSON object"),
        ("rows.jsonl", '{"text": "a"}\n[1]\n', "line 2: expected a JSON object, got list"),
        ("rows.jsonl", "", "expected at least one row"),
        ("rows.json", '[{"text": "a"}, 3]', "row 1: expected an object, got int"),
        ("rows.csv", "text,label\na,b,c\n", r"row 1: expected 2 fields \['text', 'label'\], got 3"),
        ("rows.csv", 'text,label\n"a,b\n', "line 2"),
        ("rows.parquet", "not parquet", "expected Parquet"),
        ("rows.xlsx", "x", "expected one of .*'.csv'.*got '.xlsx'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"text,label\ncaf\xe9,1\n")
    with pytest.raises(ValueError, match="expected UTF-8"):
        read_table(tmp_path / "rows.csv")


def test_a_missing_file_lists_what_is_there(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"no such file.* holds reviews\.csv"):
        read_table(tmp_path / "review.csv")


def test_a_folder_of_files_is_read_by_split_name(tmp_path):
    for name in ("train.jsonl", "reviews_dev.jsonl", "test-00000-of-00001.jsonl", "notes.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n', encoding="utf-8")
    assert sorted(read_splits(tmp_path)) == ["test", "train", "validation"]
    (tmp_path / "train-2.csv").write_text("text\na\n", encoding="utf-8")
    with pytest.raises(ValueError, match="two files for the train split"):
        read_splits(tmp_path)


def test_a_folder_without_data_lists_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"expected a saved dataset, or train .*holds notes\.txt"):
        read_splits(tmp_path)


def test_saved_datasets_and_their_class_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "dev": rows}).save_to_disk(tmp_path / "several")
    assert sorted(read_splits(tmp_path / "one")) == ["train"]
    splits = read_splits(tmp_path / "several", test_data=tiny.write_jsonl(tmp_path / "t.jsonl", ROWS))
    assert sorted(splits) == ["test", "train", "validation"]
    assert class_names(splits["train"], "label") == ["no", "yes"]
    raw = read_training_data(DataConfig(data=str(tmp_path / "several")), task=None, labels=(), seed=0)
    assert (raw.task, raw.labels) == ("classification", ["no", "yes"])


@pytest.mark.parametrize(
    ("task", "names", "wanted", "used"),
    [
        ("classification", ["id", "Review", "Sentiment"], {}, ["Review", "Sentiment"]),
        ("classification", ["premise", "hypothesis", "label"], {}, ["premise", "hypothesis", "label"]),
        ("classification", ["text", "label", "stars"], {"label": "stars"}, ["text", "stars"]),
        ("causal_lm", ["instruction", "output", "text"], {}, ["instruction", "output"]),
        ("causal_lm", ["messages", "prompt", "response"], {}, ["messages"]),
        ("causal_lm", ["messages", "prompt", "response"], {"prompt": "prompt"}, ["prompt", "response"]),
        ("causal_lm", ["text", "prompt"], {}, ["text"]),
    ],
)
def test_columns_are_found_by_their_usual_names(task, names, wanted, used):
    assert choose_columns(task, names, **wanted).used() == used


@pytest.mark.parametrize(
    ("task", "names", "wanted", "reason"),
    [
        ("classification", ["text", "stars"], {}, r"expected a label column .*got columns \['text', 'stars'\]"),
        ("classification", ["words", "label"], {}, "expected a text column .*text_column"),
        (
            "classification",
            ["text", "label"],
            {"text": "txt"},
            r"text column: expected one of \['text', 'label'\], got 'txt'",
        ),
        ("causal_lm", ["a", "b"], {}, r"expected a column 'messages'.*got columns \['a', 'b'\]"),
        ("causal_lm", ["prompt", "b"], {"prompt": "prompt"}, "expected a response column"),
    ],
)
def test_missing_columns_are_listed(task, names, wanted, reason):
    with pytest.raises(ValueError, match=reason):
        choose_columns(task, names, **wanted)


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (["text", "label"], "classification"),
        (["sentence", "target"], "classification"),
        (["text"], "causal_lm"),
        (["question", "answer", "category"], "causal_lm"),
        (["messages", "label", "text"], "causal_lm"),
    ],
)
def test_the_task_follows_from_the_columns(names, task):
    assert guess_task(DataConfig(data="x"), names) == task


def test_the_validation_split_is_the_seeds_and_keeps_the_proportions():
    rows = Dataset.from_list(
        [{"text": str(index), "label": "rare" if index % 10 == 0 else "usual"} for index in range(100)]
    )
    train, held_out = split_off_validation(rows, 0.2, seed=1, stratify_by="label")
    assert (len(train), len(held_out), held_out["label"][:].count("rare")) == (80, 20, 2)
    assert sorted(map(int, [*train["text"], *held_out["text"]])) == list(range(100))
    again = split_off_validation(rows, 0.2, seed=1, stratify_by="label")[1]
    other = split_off_validation(rows, 0.2, seed=2, stratify_by="label")[1]
    assert again["text"][:] == held_out["text"][:] != other["text"][:]
    assert len(split_off_validation(rows, 0.2, seed=1)[1]) == 20
    assert len(split_off_validation(rows.select([0, 1]), 0.01, seed=1, stratify_by="label")[1]) == 1
    with pytest.raises(ValueError, match="at least 2 rows"):
        split_off_validation(rows.select([0]), 0.5, seed=1)


@pytest.mark.parametrize(
    ("values", "given", "names"),
    [
        (["b", "a", "b"], (), ["a", "b"]),
        ([1, 0, 2], (), ["0", "1", "2"]),
        (["1", "0"], (), ["0", "1"]),
        ([True, False, None], (), ["0", "1"]),
        ([1.0, 0.0], (), ["0", "1"]),
        ([0, 1], ("bad", "good"), ["bad", "good"]),
        (["4", "5"], ("4", "5"), ["4", "5"]),
    ],
)
def test_label_names(values, given, names):
    assert label_names(values, given) == names
    assert {label_index(value, names, "row") for value in values if value is not None} == set(range(len(names)))


@pytest.mark.parametrize(
    ("values", "given", "reason"),
    [
        (
            [0, 1, 7],
            (),
            r"labels: expected the whole numbers 0..2 for 3 different labels, got \[7\], outside the range",
        ),
        ([-1, 1], (), r"got \[-1\], outside the range"),
        (["a", "a"], (), "at least two different labels"),
        (["a", "b"], ("a", "a"), "at least two different names"),
    ],
)
def test_labels_that_are_no_classes(values, given, reason):
    with pytest.raises(ValueError, match=reason):
        label_names(values, given)


@pytest.mark.parametrize("value", ["maybe", 2, -1, "2"])
def test_a_label_outside_the_range_names_its_row(value):
    with pytest.raises(
        ValueError, match=r"test data, row 4: label .* is outside the range; expected one of \['no', 'yes'\]"
    ):
        label_index(value, ["no", "yes"], "test data, row 4")
