"""Metrics of compiled kernels, kept on disk by all that they depend on: the tests and `python -m benchmarks static` compile once.

One process compiles for one target, several at once; who comes second waits for the first and reads what it wrote.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.aot.compile import ROOT, reports_in_subprocess

NOT_COMPILING = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_HOME")  # what else Triton reads may change its code


def cache_folder() -> Path:
    """Where metrics are kept: beside the tables of `fastpeft tune`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastpeft" / "static"


def reports_of(archs: Sequence[str], modules: Sequence[str], jobs: int, keep_going: bool = False) -> dict:
    """{(arch, module): report as `compile.measure_all`} of the modules that are for a target.

    With keep_going, a module whose process fails has a report without cases, and "failed" says why.
    """
    parts = max(1, jobs // max(1, len(archs)))
    wanted = [(arch, modules[part::parts]) for arch in archs for part in range(parts)]
    wanted = [(arch, [module for module in some if _is_for(module, arch)]) for arch, some in wanted]
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        found = list(pool.map(lambda one: _reports(*one, keep_going), wanted))
    reports = {(arch, module): report for (arch, _), of in zip(wanted, found) for module, report in of.items()}
    order = [(arch, module) for arch in archs for module in modules]
    return {key: reports[key] for key in order if key in reports}


def _is_for(module: str, arch: str) -> bool:
    """A module with ARCHS is for these targets only."""
    return arch in getattr(importlib.import_module(module), "ARCHS", (arch,))


def _reports(arch: str, modules: Sequence[str], keep_going: bool) -> dict[str, dict]:
    paths = {module: cache_folder() / f"{arch}-{module}-{_mark(module)}.json" for module in modules}
    cache_folder().mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        for path in sorted(paths.values()):  # in one order, so that two processes never wait for each other
            locks.enter_context(_locked(path))
        missing = [module for module, path in paths.items() if not path.is_file()]
        failed: dict[str, dict] = {}
        if missing:
            print(
                f"compiling for {arch}: {', '.join(m.rpartition('.')[2] for m in missing)}", file=sys.stderr, flush=True
            )
            if keep_going:
                for module in missing:
                    failed |= _attempted(arch, module, paths[module])
            else:
                for module, report in reports_in_subprocess(arch, missing).items():
                    _write(paths[module], report)
        return {
            m: failed[m] if m in failed else json.loads(path.read_text(encoding="utf-8")) for m, path in paths.items()
        }


def _attempted(arch: str, module: str, path: Path) -> dict[str, dict]:
    """Compile and write; or {module: a report of its failure}, which is not kept."""
    try:
        _write(path, reports_in_subprocess(arch, [module], keep_going=True)[module])
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1]
        return {module: {"triton": "", "names": [], "cases": {}, "failed": {"all kernels": why}}}
    return {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file opens the lock
        yield


def _write(path: Path, report: dict) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(report), encoding="utf-8")
    unfinished.replace(path)


def _mark(module: str) -> str:
    """A digest of all that a module's metrics depend on; a peer's version is its own `version()`."""
    import triton

    version: Callable[[], str] = getattr(importlib.import_module(module), "version", str)
    settings = {name: v for name, v in os.environ.items() if name.startswith("TRITON_") and name not in NOT_COMPILING}
    digest = hashlib.sha256(repr((triton.__version__, version(), sorted(settings.items()))).encode())
    for folder in ("kernels", "tests/aot"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
