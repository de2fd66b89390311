"""(function signature -> one-line docstring) pairs from the Python packages installed on this machine.

Sources are parsed, never imported. Nothing is downloaded and nothing leaves the machine; the pairs depend on what is
installed, so numbers from two machines are comparable only within each.
"""

import ast
import hashlib
import itertools
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpeft.demo.assets import publishing

SPLITS = ("train", "validation", "test")

_SKIPPED = re.compile(r"_|test|conftest|(vendor|vendored|idlelib|lib2to3|examples?|benchmarks?)$")
_MAX_FILE_BYTES = 300_000
_SIGNATURE_CHARACTERS = 160
_DOCSTRING_CHARACTERS = (20, 90)
_DOCSTRING_WORDS = 4
_BOILERPLATE = re.compile(
    r"https?://|[{}<>`:\\|]|\.\.\.|deprecated|see also|docstring|overrid|inherit|todo", re.IGNORECASE
)


@dataclass(frozen=True)
class Pair:
    """One public function or method: its module or class, `def ...:` on one line, the first line of its docstring."""

    owner: str
    signature: str
    docstring: str

    @property
    def package(self) -> str:
        """The top-level package, the unit by which pairs are split."""
        return self.owner.split(".")[0]

    @property
    def prompt(self) -> str:
        """What the model continues: a comment with the owner, the signature and an opened docstring."""
        return f'# {self.owner}\n{self.signature}\n    """'


def installed_roots() -> list[Path]:
    """The standard library and the folders pip installs into, without repetitions."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")))


def collect_pairs(roots: Sequence[Path], per_package: int = 60) -> list[Pair]:
    """Pairs of every package under `roots`, at most `per_package` of each, no docstring twice, in a fixed order.

    Taken: public functions and methods whose docstring starts with one whole ASCII sentence of 4 words or more and
    20 to 90 characters on its own line, outside test, private and vendored modules. A package's modules are read in
    the order of their names' SHA-256 until there is enough, so the same installed packages give the same pairs.
    """
    packages: dict[str, list[tuple[Path, str]]] = {}
    for root in roots:
        for package, files in _modules(root).items():
            packages.setdefault(package, []).extend(files)
    seen: set[str] = set()
    chosen = []
    for package in sorted(packages):
        found = (pair for path, module in packages[package] for pair in _pairs_of(path, module))
        fresh = (pair for pair in found if pair.docstring.lower() not in seen and not seen.add(pair.docstring.lower()))
        chosen += itertools.islice(fresh, per_package)
    return chosen


def split_pairs(pairs: Sequence[Pair], train: int = 1600, held_out: int = 150) -> dict[str, list[Pair]]:
    """Train, validation and test without a common package, at most `train`, `held_out` and `held_out` pairs.

    Packages go to a split by the SHA-256 of their name: 10 % to validation, 10 % to test. Where that leaves a split
    empty (few packages), modules are placed instead.
    Raises:  ValueError where even modules are too few
    """
    for unit in (lambda pair: pair.package, lambda pair: pair.owner):
        splits: dict[str, list[Pair]] = {name: [] for name in SPLITS}
        for pair in pairs:
            bucket = int(_digest(unit(pair)), 16) % 10
            splits[{0: "validation", 1: "test"}.get(bucket, "train")].append(pair)
        if all(splits.values()):
            sizes = {"train": train, "validation": held_out, "test": held_out}
            return {name: sorted(items, key=_place)[: sizes[name]] for name, items in splits.items()}
    raise ValueError(
        f"docstring pairs: expected enough documented functions for three splits, got {len(pairs)} "
        "in the installed packages; run the demo in an environment with more packages"
    )


def write_splits(splits: dict[str, list[Pair]], folder: Path) -> dict[str, Path]:
    """Write train.jsonl, validation.jsonl and test.jsonl with the columns prompt and response; return their paths."""
    with publishing(folder) as draft:
        for name, pairs in splits.items():
            rows = ({"prompt": p.prompt, "response": f'{p.docstring}"""'} for p in pairs)
            (draft / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in splits}


def _place(pair: Pair) -> str:
    return _digest(f"{pair.owner}\n{pair.signature}\n{pair.docstring}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _modules(root: Path) -> dict[str, list[tuple[Path, str]]]:
    """Top-level package -> (file, dotted module name) of its public modules, in the order of the names' SHA-256."""
    packages: dict[str, list[tuple[Path, str]]] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if _is_public(name)]
        parts = Path(folder).relative_to(root).parts
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix == ".py" and ((parts and stem == "__init__") or _is_public(stem)):
                names = parts if stem == "__init__" else (*parts, stem)
                packages.setdefault(names[0], []).append((Path(folder, file), ".".join(names)))
    return {package: sorted(files, key=lambda item: _digest(item[1])) for package, files in packages.items()}


def _is_public(name: str) -> bool:
    return name.isidentifier() and not _SKIPPED.match(name)


def _pairs_of(path: Path, module: str) -> list[Pair]:
    """The pairs of one file; none where it cannot be read or parsed."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    pairs = []
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        name = module if owner is tree else f"{module}.{owner.name}"
        if owner is tree or not owner.name.startswith("_"):
            functions = (node for node in owner.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
            pairs += [_pair(node, name) for node in functions if _is_public(node.name)]
    return [pair for pair in pairs if pair]


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, owner: str) -> Pair | None:
    docstring = _first_sentence(ast.get_docstring(node) or "")
    if docstring is None:
        return None
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"{prefix} {node.name}({ast.unparse(node.args)}){result}:"
    if len(signature) > _SIGNATURE_CHARACTERS or not signature.isascii() or "\n" in signature:
        return None
    return Pair(owner, signature, docstring)


def _first_sentence(docstring: str) -> str | None:
    """The first line where it is a whole, plain English-looking sentence by itself, else None."""
    lines = docstring.strip().splitlines()
    if not lines or (len(lines) > 1 and lines[1].strip()):
        return None
    line = lines[0].strip()
    shortest, longest = _DOCSTRING_CHARACTERS
    plain = line.isascii() and line.endswith(".") and line[:1].isupper() and not _BOILERPLATE.search(line)
    fits = shortest <= len(line) <= longest and len(line.split()) >= _DOCSTRING_WORDS
    return line if plain and fits else None
