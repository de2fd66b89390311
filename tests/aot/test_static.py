"""`python -m benchmarks static`: faults make --check fail, peers that are not here or do not compile never stop it."""

import dataclasses
import json
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import static
from tests.aot import faults, liger_peers
from tests.aot.cached import reports_of
from tests.aot.test_gates import GOOD, report_of


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_spill_and_narrow_loads_in_a_hot_loop_fail_the_check(arch, capsys):
    assert command.main(["static", "--check", "--arch", arch, "--cases", "tests.aot.faults"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith(f"{arch} {faults.SPILL}: ") and "spill instructions in the main loop > 0" in line
        for line in lines
    )
    assert any(line.startswith(f"{arch} {faults.NARROW}: 0.") and "in 16-byte loads < 0.8" in line for line in lines)


def test_one_target_is_compiled_once(tmp_path, monkeypatch):
    asked = []

    def compile_for(arch, modules, keep_going=False):
        asked.append((arch, tuple(modules)))
        return {module: {"triton": "3", "names": [], "cases": {}, "failed": {}} for module in modules}

    monkeypatch.setattr("tests.aot.cached.reports_in_subprocess", compile_for)
    one, two, three = "tests.aot.planted", "tests.aot.faults", "tests.aot.peers"
    for _ in range(2):
        assert list(reports_of(["sm_80"], [one], 1)) == [("sm_80", one)]
    assert asked == [("sm_80", (one,))]
    reports_of(["sm_80", "gfx942"], [one, two, three], 2)
    assert sorted(asked[1:]) == [("gfx942", (one, two)), ("sm_80", (two, three))]  # three has no tiles for gfx942
    asked.clear()
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # other code: nothing that is known holds
    reports_of(["sm_90"], [one, two], 2)
    assert sorted(asked) == [("sm_90", (two,)), ("sm_90", (one,))]  # two processes for two jobs


REPORT = {"triton": "3.8.0", "names": ["k"], "cases": {}, "failed": {}}


@pytest.fixture
def measured(monkeypatch):
    """Metrics without compiling: one kernel of ours, and a peer whose kernel does not compile."""

    def fake(archs, modules, jobs, keep_going=False):
        if keep_going:
            return {(arch, static.PEERS[-1]): REPORT | {"failed": {"liger-rope": "no such op"}} for arch in archs}
        return {(arch, "fastpeft.kernels.aot_rope"): report_of(good=GOOD) for arch in archs}

    monkeypatch.setattr(static, "reports_of", fake)


def test_peers_that_are_absent_or_fail_are_named(measured, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert command.main(["static", "--arch", "sm_90", "--peers"]) == 0
    printed = capsys.readouterr().out
    assert "| sm_90 | good | 100 |" in printed
    assert "Liger-Kernel: absent, not installed" in printed
    assert "Liger-Kernel at sm_90: liger-rope failed: no such op" in printed


def _package(folder, monkeypatch, text: str) -> None:
    """A liger_kernel for this process and those that it starts."""
    (folder / "liger_kernel" / "ops").mkdir(parents=True)
    (folder / "liger_kernel" / "__init__.py").write_text(text)
    for name in ("__init__", "utils", "rms_norm", "swiglu", "geglu", "rope", "fused_linear_cross_entropy"):
        (folder / "liger_kernel" / "ops" / f"{name}.py").write_text("")
    (folder / "liger_kernel-9.9.dist-info").mkdir()
    (folder / "liger_kernel-9.9.dist-info" / "METADATA").write_text("Name: liger-kernel\nVersion: 9.9\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_peer_that_does_not_import_says_why(tmp_path, monkeypatch):
    _package(tmp_path, monkeypatch, "raise ImportError('needs a GPU')")
    assert liger_peers.version() == "does not import: needs a GPU"
    assert liger_peers.aot_cases("sm_90") == []


def test_a_peer_with_another_api_fails_alone(tmp_path, monkeypatch):
    _package(tmp_path, monkeypatch, "")
    assert liger_peers.version() == "9.9"
    (report,) = reports_of(["sm_90"], ["tests.aot.liger_peers"], 1, keep_going=True).values()
    assert report["cases"] == {}
    assert "AttributeError" in report["failed"]["all kernels"]


def test_the_results_file_has_the_kernels_of_today():
    text = liger_peers.RESULTS.read_text(encoding="utf-8")
    assert "Compiled, not run" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if " | fastpeft | " in line]
    found = {(arch, op): int(warps) for arch, op, _, warps, *_ in rows}
    expected = {
        (arch, name): launch.config.num_warps
        for arch in dict.fromkeys(arch for arch, _ in found)
        for name, launch in liger_peers.launches_of(arch)
    }
    assert found == expected, "run python -m benchmarks static --arch sm_90 gfx942 --peers --liger FILE"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kernel", "nope"], "there are good"),
        (["--jobs", "0"], "expected 1 or more, got 0"),
        (["--liger", "x.md"], "expected --peers"),
        (["--cases", "tests.aot.nope"], "fastpeft.kernels.aot_rope"),
    ],
)
def test_wrong_values_are_one_line_that_lists_what_exists(measured, arguments, named, capsys):
    assert command.main(["static", "--arch", "sm_90", *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_the_loop_s_instructions_are_named_most_frequent_first(measured, monkeypatch, capsys):
    mix = {"HMMA": 32, "LDS": 9, "FFMA": 8, "LDGSTS": 4, "BAR": 2, "BRA": 1}
    mixed = dataclasses.replace(GOOD, mix=mix)
    monkeypatch.setattr(static, "reports_of", lambda *_, **__: {("sm_90", "m"): report_of(good=mixed)})
    assert command.main(["static", "--arch", "sm_90"]) == 0
    assert "| HMMA 32, LDS 9, FFMA 8, LDGSTS 4, BAR 2 |" in capsys.readouterr().out


def test_metrics_are_written_by_target(measured, tmp_path):
    assert command.main(["static", "--arch", "sm_90", "sm_80", "--json", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["sm_80"]["good"]["registers"] == 100
