"""`import fastpeft` is cheap, and works where its optional and platform-bound dependencies are missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("triton", "transformers", "peft", "bitsandbytes")

BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ImportError(f"{{name}} is blocked by this test", name=name)

sys.meta_path.insert(0, Blocked())
"""

LORA_STEP = """
import torch
x = torch.randn(3, 8, requires_grad=True)
y = fastpeft.lora_linear(x, torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2))
y.sum().backward()
assert y.shape == (3, 5) and torch.isfinite(x.grad).all()
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that finds the package in this checkout, with another working directory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("TRITON_INTERPRET", "FASTPEFT_IMPL"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)


def test_import_loads_nothing_heavy():
    done = run_python(f"import sys, fastpeft; print([n for n in {HEAVY} if n in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_import_works_where_all_of_them_are_blocked():
    done = run_python(f"{BLOCK}\nimport fastpeft\nprint(fastpeft.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_public_name_loads_where_all_of_them_are_blocked():
    done = run_python(f"{BLOCK}\nimport fastpeft\nfor name in fastpeft.__all__:\n    getattr(fastpeft, name)")
    assert done.returncode == 0, done.stderr


def test_lora_linear_trains_without_triton():
    done = run_python(f"{BLOCK}\nimport fastpeft\n{LORA_STEP}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", HEAVY)
def test_the_block_blocks(package):
    done = run_python(f"{BLOCK}\nimport {package}")
    assert done.returncode == 1
    assert f"{package} is blocked by this test" in done.stderr
