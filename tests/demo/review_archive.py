"""An archive laid out like vaderSentiment's source distribution, with made-up reviews."""

import io
import tarfile
from pathlib import Path

GOOD, BAD = "lovely and warm", "dull and cold"


def reviews(count: int) -> list[tuple[float, str]]:
    """Distinct sentences, every second one good."""
    return [
        (2.0, f"Review {index} is a {GOOD} film.") if index % 2 else (-1.5, f"Review {index} is a {BAD} film.")
        for index in range(count)
    ]


def write(path: Path, rows: list[tuple[float, str]]) -> Path:
    """Write the outer archive, with the inner one and its ratings, and return its path."""
    lines = "".join(f"{number}\t{rating}\t{text}\r\n" for number, (rating, text) in enumerate(rows))
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        _add(tar, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", lines.encode())
    with tarfile.open(path, "w:gz") as tar:
        _add(tar, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
