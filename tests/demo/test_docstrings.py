"""(signature -> docstring) pairs from packages laid out in a temporary folder."""

import json
import textwrap

import pytest

from fastpeft.demo.docstrings import SPLITS, Pair, collect_pairs, installed_roots, split_pairs, write_splits

SOURCE = '''
class Reader:
    """A reader of things that are written."""

    def read(self, size: int = -1, *, strict=True) -> bytes:
        """Read up to size bytes from the stream.

        More about it.
        """

    def _fill(self):
        """Fill the buffer with more bytes."""


class _Hidden:
    def shown(self):
        """Return what is never looked at."""


async def fetch(url):
    """Fetch a page without blocking the loop."""


def short(x):
    """Too short."""


def open_ended(x):
    """This line is only the beginning of a sentence
    that goes on here.
    """


def accents(x):
    """Return the caf\\u00e9 that is nearest by."""


def linked(x):
    """See https://example.org for what this does."""


def undocumented(x):
    return x


def test_it(x):
    """Check that everything works as expected."""


def repeated(x):
    """Fetch a page without blocking the LOOP."""
'''


@pytest.fixture
def root(tmp_path):
    """Packages `shelf` (a public module, a private one and tests), `broken` and a plain module."""
    files = {
        "shelf/__init__.py": 'def shelve(book):\n    """Put a book where it belongs."""\n',
        "shelf/readers.py": SOURCE,
        "shelf/_private.py": 'def f(x):\n    """Return something nobody should see."""\n',
        "shelf/tests/test_readers.py": 'def g(x):\n    """Return something only tests should see."""\n',
        "broken/__init__.py": 'def f(x:\n    """Return something that cannot be parsed."""\n',
        "broken/latin.py": b'# \xe9\ndef f(x):\n    """Return something in another encoding."""\n',
        "plain.py": 'raise SystemExit("imported")\ndef add(a, b):\n    """Add two numbers and return the sum."""\n',
        "not-a-module/inner.py": 'def f(x):\n    """Return something that cannot be imported."""\n',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def test_what_is_taken(root):
    expected = {
        Pair("plain", "def add(a, b):", "Add two numbers and return the sum."),
        Pair("shelf", "def shelve(book):", "Put a book where it belongs."),
        Pair(
            "shelf.readers.Reader",
            "def read(self, size: int=-1, *, strict=True) -> bytes:",
            "Read up to size bytes from the stream.",
        ),
        Pair("shelf.readers", "async def fetch(url):", "Fetch a page without blocking the loop."),
    }
    assert set(collect_pairs([root])) == expected
    assert collect_pairs([root]) == collect_pairs([root, root / "absent"])


def test_a_prompt_is_an_opened_docstring():
    prompt = Pair("shelf.Reader", "def read(self):", "Read all of it at once.").prompt
    assert prompt == textwrap.dedent('''\
        # shelf.Reader
        def read(self):
            """''')


def test_a_package_gives_no_more_than_its_share(root):
    many = "".join(f'def f{i}(x):\n    """Return number {i} of the series."""\n' for i in range(30))
    (root / "plain.py").write_text(many)
    assert sum(pair.package == "plain" for pair in collect_pairs([root], per_package=7)) == 7


def pairs_of(packages: int, modules: int, functions: int) -> list[Pair]:
    return [
        Pair(f"package{p}.module{m}", f"def function{f}(x):", f"Return {f} of module {m} of package {p}.")
        for p in range(packages)
        for m in range(modules)
        for f in range(functions)
    ]


def shared(groups: list[set[str]]) -> set[str]:
    """Names that are in more than one of the groups."""
    return {name for group in groups for name in group if sum(name in other for other in groups) > 1}


def test_held_out_packages_are_not_trained_on():
    splits = split_pairs(pairs_of(60, 1, 10), train=200, held_out=30)
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 200, "validation": 30, "test": 30}
    assert not shared([{pair.package for pair in splits[name]} for name in SPLITS])
    assert splits == split_pairs(pairs_of(60, 1, 10)[::-1], train=200, held_out=30)


def test_with_few_packages_modules_are_held_out():
    splits = split_pairs(pairs_of(2, 40, 2))
    owners = [{pair.owner for pair in splits[name]} for name in SPLITS]
    assert all(owners)
    assert not shared(owners)


def test_too_few_pairs_are_named():
    with pytest.raises(ValueError, match="expected enough documented functions for three splits, got 2"):
        split_pairs(pairs_of(1, 1, 2))


def test_files_hold_prompts_and_closed_docstrings(tmp_path):
    splits = split_pairs(pairs_of(60, 1, 2))
    paths = write_splits(splits, tmp_path / "data")
    for name in SPLITS:
        rows = [json.loads(line) for line in paths[name].read_text(encoding="utf-8").splitlines()]
        assert [(row["prompt"], row["response"]) for row in rows] == [
            (pair.prompt, pair.docstring + '"""') for pair in splits[name]
        ]


def test_real_sources_give_real_pairs():
    stdlib = installed_roots()[0]
    pairs = collect_pairs([stdlib / "asyncio", stdlib / "email", stdlib / "http"], per_package=100)
    assert len(pairs) > 60
    assert all(pair.docstring.endswith(".") and pair.signature.endswith(":") for pair in pairs)
