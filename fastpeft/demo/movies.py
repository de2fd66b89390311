"""Movie review sentences with crowd ratings, as a binary classification data set.

Source: the texts and ratings of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014, as shipped in the vaderSentiment 3.3.2 source distribution (MIT). The sentences are
excerpts of third-party reviews: they are read on the user's machine and never shipped with fastpeft.
This is not SST-2: whole sentences only, and the label is the sign of about 20 raters' mean.
"""

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from fastpeft.demo.assets import publishing

LABELS = ("negative", "positive")
SPLITS = ("train", "validation", "test")

_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_MIN_WORDS = 3
_MIN_RATING = 0.5  # |mean rating|, on a scale from -4 to 4: nearer to zero the raters themselves disagree
_TRAIN, _VALIDATION = 0.8, 0.1
_HASH_SEED = "fastpeft-0"


@dataclass(frozen=True)
class Snippet:
    """One sentence, its label and the raters' mean in -4..4."""

    text: str
    label: str
    rating: float


def read_snippets(archive: Path) -> list[tuple[float, str]]:
    """(mean rating, sentence) of every line of the movie file inside the vaderSentiment source archive."""
    try:
        with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(_INNER_ARCHIVE)) as inner:
            text = inner.extractfile(_RATINGS).read().decode("utf-8")
    except (KeyError, tarfile.TarError) as error:
        raise ValueError(
            f"demo data {archive}: expected {_INNER_ARCHIVE} with {_RATINGS} inside, got {error}"
        ) from error
    rows = (line.split("\t") for line in text.splitlines())
    return [(float(row[1]), row[2].strip()) for row in rows if len(row) == 3]


def split_snippets(rows: list[tuple[float, str]]) -> dict[str, list[Snippet]]:
    """Train, validation and test, 80/10/10 in each class, in an order that depends on the sentences alone.

    Sentences are compared by their lower-case letters and digits. Repetitions become one sentence with the mean of
    their ratings, or none where their signs differ; fewer than three words, or a mean within 0.5 of zero, are left
    out. A sentence's place is its SHA-256, so the same sentence is in the same split on every machine.
    """
    ratings: dict[str, list[tuple[float, str]]] = {}
    for rating, text in rows:
        key = re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
        if len(key.split()) >= _MIN_WORDS:
            ratings.setdefault(key, []).append((rating, text))

    classes: dict[str, list[tuple[str, Snippet]]] = {label: [] for label in LABELS}
    for key, group in ratings.items():
        average = mean(rating for rating, _ in group)
        if len({rating > 0 for rating, _ in group}) > 1 or abs(average) < _MIN_RATING:
            continue
        snippet = Snippet(text=group[0][1], label=LABELS[average > 0], rating=round(average, 3))
        place = hashlib.sha256((_HASH_SEED + key).encode()).hexdigest()
        classes[snippet.label].append((place, snippet))

    placed: dict[str, list[tuple[str, Snippet]]] = {split: [] for split in SPLITS}
    for members in classes.values():
        members.sort(key=lambda item: item[0])
        train = int(len(members) * _TRAIN)
        validation = train + int(len(members) * _VALIDATION)
        placed["train"] += members[:train]
        placed["validation"] += members[train:validation]
        placed["test"] += members[validation:]
    return {
        split: [snippet for _, snippet in sorted(items, key=lambda item: item[0])] for split, items in placed.items()
    }


def write_splits(archive: Path, folder: Path) -> dict[str, Path]:
    """Write train.jsonl, validation.jsonl and test.jsonl with columns text, label, rating; return their paths."""
    splits = split_snippets(read_snippets(archive))
    with publishing(folder) as draft:
        for split, snippets in splits.items():
            lines = (json.dumps(vars(snippet), ensure_ascii=False) for snippet in snippets)
            (draft / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return {split: folder / f"{split}.jsonl" for split in SPLITS}
