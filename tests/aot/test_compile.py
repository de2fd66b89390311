"""Every kernel, in every shipped configuration, compiled for GPUs that need not be here, and held to the gates.

One test per target, which is `python -m benchmarks static --check` of it: a target's kernels share one subprocess, since kernels
cannot be compiled where they are interpreted.
"""

import json
import warnings

import pytest

from benchmarks import __main__ as command
from tests.aot import compile as aot
from tests.aot.gates import BASELINE

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
def test_kernels_pass_their_gates(arch, tmp_path, capsys):
    assert BASELINE.exists(), "no tests/aot/baseline.json; run python -m tests.aot.compile --update"
    metrics = tmp_path / "metrics.json"
    failed = command.main(["static", "--check", "--arch", arch, "--jobs", "1", "--json", str(metrics)])
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("|")]
    assert not failed, "\n" + "\n".join(said)
    if said != ["every gate holds"]:
        warnings.warn(said[0], stacklevel=1)  # another Triton than the baseline's
    names = json.loads(metrics.read_text(encoding="utf-8"))[arch]
    counts = {kernel: sum(name.startswith(f"{kernel}-") for name in names) for kernel in KERNELS}
    assert all(counts[kernel] >= least for kernel, least in KERNELS.items()), counts
