"""Set-up of every test: one thread, no network, Triton's interpreter where there is no GPU, watched kernel launches.

The environment is set before torch and triton are imported, since both read it only then.
"""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: threads cost up to four times what they give
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the poison below turns on deterministic algorithms
os.environ.pop("FASTPEFT_IMPL", None)  # a developer's choice must not decide what is tested,
os.environ["FASTPEFT_TUNE_DIR"] = os.path.join(
    tempfile.gettempdir(), "fastpeft-tests-no-tune-tables"
)  # nor a measurement

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from fastpeft.integrations.acceleration import few_rows  # noqa: E402
from tests import interpreter  # noqa: E402
from tests.traffic import Probe  # noqa: E402

if not HAS_GPU:
    interpreter.install()

KERNEL_TESTS = Path(__file__).parent / "kernels"
NO_GPU = "no GPU here: kernels run in Triton's interpreter, tests marked gpu are deselected"


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "watched: launches Triton kernels outside tests/kernels; see the fixture `probe`"
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU with Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _few_rows_are_ours(monkeypatch):
    """Accelerated modules compute small calls themselves in tests, whose calls are all small."""
    monkeypatch.setattr(few_rows, "ROWS", -1)


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin return NaN (integers: the largest value), so that an element never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill_before
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def probe(poisoned_memory):
    """A strict Probe over the test: fails on an access out of bounds and on a race. On a GPU it sees no launches."""
    if HAS_GPU:
        yield Probe()
        return
    with Probe() as watching:
        yield watching


@pytest.fixture(autouse=True)
def _watched_kernels(request):
    """Applies `probe` to all tests in tests/kernels and to those marked `watched`."""
    in_kernel_tests = KERNEL_TESTS in Path(request.node.path).parents
    if in_kernel_tests or request.node.get_closest_marker("watched"):
        request.getfixturevalue("probe")


def pytest_report_header():
    return None if HAS_GPU else NO_GPU


def pytest_collection_modifyitems(config, items):
    if HAS_GPU:
        return
    gpu_only = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[_DESELECTED] = len(gpu_only)
    if gpu_only:
        items[:] = [item for item in items if item not in gpu_only]
        config.hook.pytest_deselected(items=gpu_only)


_DESELECTED = pytest.StashKey[int]()


def pytest_sessionfinish(session):
    """Under pytest-xdist only workers collect: they send their count to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu_deselected"] = session.config.stash.get(_DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    output = getattr(node, "workeroutput", {})
    node.config.stash[_DESELECTED] = max(node.config.stash.get(_DESELECTED, 0), output.get("gpu_deselected", 0))


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash.get(_DESELECTED, 0)
    if count:
        terminalreporter.write_line(f"{count} test(s) marked gpu deselected: no GPU here")
