"""The attention kernels against plain causal attention in the manner of Triton's tutorial, by the same compiler."""

import pytest

from tests.aot import attention_peers
from tests.aot import compile as aot
from tests.aot.metrics import Metrics
from tests.tolerance import STATIC_SHARE_SLACK

D = 128


def aot_cases(arch: str) -> list:
    """Those of one head dim; read in the subprocess that compiles them."""
    return [case for case in attention_peers.aot_cases(arch) if case.name.endswith(f"-d{D}")]


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
