"""The attention kernels against plain causal attention in the manner of Triton's tutorial, by the same compiler."""

from pathlib import Path

import pytest

from tests.aot import attention_peers
from tests.aot import compile as aot
from tests.aot.metrics import Metrics
from tests.tolerance import STATIC_SHARE_SLACK

D = 128


def aot_cases(arch: str) -> list:
    """Those of one head dim; read in the subprocess that compiles them."""
    return [case for case in attention_peers.aot_cases(arch) if case.name.endswith(f"-d{D}")]


def rows_of_results() -> list[str]:
    text = attention_peers.RESULTS.read_text(encoding="utf-8")
    return text[text.index(attention_peers.HEAD) + len(attention_peers.HEAD) :].splitlines()


def test_the_results_file_has_the_kernels_and_tiles_of_today():
    labels = [
        attention_peers.label(arch, name, launch)
        for arch in attention_peers.ARCHS
        for name, launch, _ in attention_peers.launches_of(arch)
    ]
    rows = rows_of_results()
    assert len(rows) == len(labels)
    for row, label in zip(rows, labels, strict=True):
        assert row.startswith(label), "run python -m tests.aot.attention_peers"


def test_readme_shows_the_rows_of_one_head_dim():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = [row for row in rows_of_results() if f"-d{D} " in row]
    assert attention_peers.HEAD + "\n".join(shown) in readme


@pytest.mark.slow
def test_the_backward_keeps_its_registers_where_the_tutorials_spills():
    cases = aot.measure_in_subprocess("sm_90", ["tests.aot.test_attention_peers"])["cases"]
    metrics = {name.removesuffix(f"-d{D}"): Metrics(**case["metrics"]) for name, case in cases.items()}
    assert metrics["tutorial-bwd"].spills > 0
    for kernel, peer in (("fwd", "tutorial-fwd"), ("dq", "tutorial-bwd"), ("dkdv", "tutorial-bwd")):
        ours, theirs = metrics[kernel], metrics[peer]
        assert ours.loop_spills == 0, kernel
        assert ours.spills <= theirs.spills or ours.spills <= 2, kernel
        assert ours.pipe_share >= theirs.pipe_share - STATIC_SHARE_SLACK, kernel
