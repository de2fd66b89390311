"""JSON lines that grow batch by batch, and go on where they ended when the same work is started again."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastpeft.checkpoint import replace_files


def digest(*paths: str | Path) -> str:
    """SHA-256 over the bytes of the files, in order."""
    found = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


class GrowingFile:
    """`path`, to which complete rows are appended; `done` of them are there already.

    Until `finish`, a file PATH.unfinished.json beside it says what the rows were made of (`made_of`, by name); so a run that was
    cut off is told from a complete file, and from a run over other data. A row that was written in part is cut away.
    Raises:  FileExistsError for a complete file; ValueError for one that was begun with something else
    """

    def __init__(self, path: str | Path, made_of: dict[str, Any], *, overwrite: bool = False):
        self.path = Path(path)
        self.note = unfinished_note(self.path)
        self.done = 0
        kept = 0
        if self.path.exists() and not overwrite:
            if not self.note.exists():
                raise FileExistsError(f"output {path}: the file exists; use another name or --overwrite")
            self._check(made_of)
            written = self.path.read_bytes()
            kept = written.rfind(b"\n") + 1
            self.done = written.count(b"\n")
        replace_files(
            {self.note: lambda draft: draft.write_text(json.dumps(made_of, indent=2) + "\n", encoding="utf-8")}
        )
        self._file = self.path.open("r+b" if kept else "wb")
        self._file.truncate(kept)
        self._file.seek(kept)

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the rows and hand them to the system."""
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()

    def finish(self) -> None:
        """All rows are there."""
        self.note.unlink()

    def close(self) -> None:
        self._file.close()

    def _check(self, made_of: dict[str, Any]) -> None:
        try:
            begun = json.loads(self.note.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.note}: expected what fastpeft predict writes, got {error}; use --overwrite"
            ) from error
        changed = [name for name in made_of if not isinstance(begun, dict) or begun.get(name) != made_of[name]]
        if changed:
            raise ValueError(
                f"output {self.path}: was begun with another {', '.join(changed)}; finish it with the same, name another "
                "file, or --overwrite it"
            )


def unfinished_note(path: Path) -> Path:
    """The file that stands beside `path` while it grows."""
    return path.with_name(path.name + ".unfinished.json")
