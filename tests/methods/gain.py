"""The method that CONTRIBUTING.md shows, run as it stands there: a method of another package for the tests."""

import contextlib
import re
import sys
import types
from pathlib import Path

from fastpeft.methods import METHODS

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def source() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return block


@contextlib.contextmanager
def registered():
    """Inside, the method is registered; yields its module."""
    module = types.ModuleType("gain_of_contributing")
    module.__file__ = str(CONTRIBUTING)
    sys.modules[module.__name__] = module  # dataclasses look a class's module up there
    before = dict(METHODS)
    try:
        exec(compile(source(), str(CONTRIBUTING), "exec"), module.__dict__)
        yield module
    finally:
        METHODS.clear()
        METHODS.update(before)
        del sys.modules[module.__name__]
