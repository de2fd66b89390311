"""The attention kernels' own goals, by target: the limits that kernels/aot_attention.py states, on the compiled code."""

import pytest

from tests.aot import compile as aot
from tests.aot.gates import absolute_failures
from tests.aot.metrics import Metrics


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiled_kernels_reach_their_goals(arch):
    cases = aot.measure_in_subprocess(arch, ["fastpeft.kernels.aot_attention"])["cases"]
    failures = [
        f"{name}: {failure}"
        for name, case in cases.items()
        for failure in absolute_failures(Metrics(**case["metrics"]), case["limits"])
    ]
    assert not failures, "\n" + "\n".join(failures)
