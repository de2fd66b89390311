"""Every kernel, in every shipped configuration, compiled for GPUs that need not be here, and held to the gates.

One test per target, since a target's kernels share one subprocess (kernels cannot be compiled where they are interpreted).
"""

import warnings

import pytest

from tests.aot import compile as aot
from tests.aot.gates import BASELINE, failures_of, read_baseline

KERNELS = {  # launcher: how many distinct compilations of it there are at least
    "lora_down": 4,
    "lora_epilogue": 4,
    "lora_epilogue_gain": 2,
    "lora_grad_s_b": 4,
    "lora_grad_x": 4,
    "lora_grad_a": 4,
    "lora_keep": 1,
    "attention_dkdv": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_kernels_pass_their_gates(arch):
    report = aot.measure_in_subprocess(arch)
    counts = {kernel: sum(name.startswith(f"{kernel}-") for name in report["cases"]) for kernel in KERNELS}
    assert all(counts[kernel] >= least for kernel, least in KERNELS.items()), counts
    assert BASELINE.exists(), "no tests/aot/baseline.json; run python -m tests.aot.compile --update"
    baseline = read_baseline()
    if baseline["triton"] != report["triton"]:
        warnings.warn(
            f"baseline.json is of Triton {baseline['triton']}, this is {report['triton']}: absolute gates only",
            stacklevel=1,
        )
    failures = failures_of(arch, report, baseline)
    assert not failures, "\n" + "\n".join(failures)
