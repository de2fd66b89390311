"""The method that CONTRIBUTING.md shows, run as it stands there: a method of another package for the tests."""

import contextlib
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

from fastpeft.methods import METHODS

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
NAME = "gain_of_contributing"


def source() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (method,) = (block for block in blocks if "GainConfig" in block)
    return method


@contextlib.contextmanager
def registered():
    """Inside, the method is registered; yields its module, from a file: the command line reads flags' texts there."""
    before = dict(METHODS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{NAME}.py"
        file.write_text(source(), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(NAME, file)
        module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            METHODS.clear()
            METHODS.update(before)
            del sys.modules[NAME]
