"""What the in-loop 4-bit GEMM has to reach on sm_80 and sm_90, measured on its compiled kernels.

The gates that all targets share are in the cases' own limits (kernels/aot_nf4.py), which test_compile.py applies.
"""

import pytest

from tests.aot.cached import reports_of
from tests.aot.gates import absolute_failures
from tests.aot.metrics import Metrics

# Sixteen rows: w comes in 16-byte copies (with narrower ones the share of wide bytes would be below 0.55), 36 KiB of it per
# SM are under way. Many rows: the tensor cores are the busiest pipe.
FEW_ROWS = {"instructions_per_element": 7.0, "vec128": 0.85, "bytes_in_flight": 36 * 1024}
MANY_ROWS = {"pipe_share": 0.95}
GOALS = {
    "nf4_lora_gemm-bf16-r16-skinny": FEW_ROWS,
    "nf4_lora_gemm-bf16-nested-r16-skinny": FEW_ROWS,
    "nf4_lora_grad_x-bf16-r16-skinny": FEW_ROWS,
    "nf4_lora_grad_x-bf16-nested-r16-skinny": FEW_ROWS,
    "nf4_lora_gemm-bf16-r16-large": MANY_ROWS,
    "nf4_lora_gemm-bf16-nested-r16-large": MANY_ROWS,
    "nf4_lora_grad_x-bf16-r16-large": MANY_ROWS,
    "nf4_lora_grad_x-bf16-r16-large-dropout": MANY_ROWS,
    "nf4_lora_grad_x-bf16-nested-r16-large-dropout": MANY_ROWS,
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_kernels_reach_their_goals(arch):
    (report,) = reports_of([arch], ["fastpeft.kernels.aot_nf4"], 1).values()
    failures = [
        f"{arch} {name}: {failure}"
        for name, goal in GOALS.items()
        for failure in absolute_failures(Metrics(**report["cases"][name]["metrics"]), goal)
    ]
    assert not failures, "\n" + "\n".join(failures)
