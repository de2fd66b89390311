"""A self-contained page around sections, and writing it whole or not at all."""

import os
import tempfile
from collections.abc import Iterable
from html import escape
from pathlib import Path

from fastpeft.training.report_style import STYLE


def html_page(title: str, sections: Iterable[str]) -> str:
    """The page as text; empty sections are left out. It needs no network, no script and no font file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · fastpeft</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A heading and what is under it, or nothing."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def write_html(page: str, path: str | os.PathLike) -> Path:
    """Write `page` to `path` through a temporary name, and return the path.

    Raises OSError where the folder cannot be written; an existing page is then left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(page)
        os.chmod(draft, 0o644)  # mkstemp's own mode is private to the user
        os.replace(draft, path)
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise
    return path
