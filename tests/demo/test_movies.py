"""The sentiment split: the same sentence goes to the same place everywhere, on archives made up here."""

import io
import json
import random
import tarfile

import pytest

from fastpeft.demo.movies import SPLITS, read_snippets, split_snippets, write_splits
from tests.demo import review_archive


def test_rows_are_read_from_the_archive_within_the_archive(tmp_path):
    archive = review_archive.write(tmp_path / "a.tar.gz", [(1.5, "A fine film."), (-2.0, "Not for me, thanks.")])
    assert read_snippets(archive) == [(1.5, "A fine film."), (-2.0, "Not for me, thanks.")]


def test_another_archive_is_named(tmp_path):
    path = tmp_path / "other.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"), io.BytesIO())
    with pytest.raises(ValueError, match=r"other\.tar\.gz: expected .*hutto_ICWSM_2014"):
        read_snippets(path)


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    rows = review_archive.reviews(200)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert split_snippets(rows) == split_snippets(shuffled)


def test_a_sentence_stays_in_its_place_when_others_are_the_same():
    """The order within a split is by hash; the pinned sentence shows that the hash has not changed."""
    splits = split_snippets(review_archive.reviews(200))
    assert [len(splits[name]) for name in SPLITS] == [160, 20, 20]
    assert splits["test"][0].text == "Review 59 is a lovely and warm film."


def test_splits_share_no_sentence_and_keep_the_classes_apart():
    splits = split_snippets(review_archive.reviews(200))
    texts = [snippet.text for split in splits.values() for snippet in split]
    assert len(texts) == len(set(texts)) == 200
    for snippets in splits.values():
        positive = [snippet for snippet in snippets if snippet.label == "positive"]
        assert len(positive) == len(snippets) / 2
        assert all(snippet.rating > 0 for snippet in positive)


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([(0.4, "Close to nothing at all.")], []),
        ([(2.0, "Too short")], []),
        ([(2.0, "Three words now!")], [("positive", 2.0)]),
        ([(2.0, "The same words."), (1.0, "the SAME  words")], [("positive", 1.5)]),
        ([(2.0, "The same words."), (-1.0, "the same words!")], []),
    ],
    ids=["undecided", "two words", "three words", "repetition", "contradiction"],
)
def test_what_is_left_out(rows, kept):
    splits = split_snippets(rows)
    assert [(snippet.label, snippet.rating) for split in splits.values() for snippet in split] == kept


def test_files_hold_the_rows_in_order(tmp_path):
    archive = review_archive.write(tmp_path / "a.tar.gz", review_archive.reviews(40))
    paths = write_splits(archive, tmp_path / "data")
    splits = split_snippets(read_snippets(archive))
    for name in SPLITS:
        rows = [json.loads(line) for line in paths[name].read_text(encoding="utf-8").splitlines()]
        assert rows == [vars(snippet) for snippet in splits[name]]
