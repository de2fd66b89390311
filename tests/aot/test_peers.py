"""The LoRA GEMM against plain products in the manner of Triton's tutorials, compiled by the same compiler for each target."""

import pytest

from tests.aot import peers
from tests.aot.cached import reports_of
from tests.aot.metrics import Metrics
from tests.tolerance import STATIC_SHARE_SLACK


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_low_rank_part_costs_nothing_in_the_loop(arch):
    """No more spills than a plain product over the same tile, and no smaller share of the loop for the tensor cores."""
    (report,) = reports_of([arch], ["tests.aot.peers"], 1).values()
    metrics = {name: Metrics(**case["metrics"]) for name, case in report["cases"].items()}
    plain = [measured for name, measured in metrics.items() if name.startswith("tutorial")]
    ours = {name: measured for name, measured in metrics.items() if not name.startswith("tutorial")}
    assert plain
    assert len(ours) == len(peers.OURS) * len(peers.RANKS)
    for name, measured in ours.items():
        assert measured.spills <= min(peer.spills for peer in plain), name
        assert measured.shared <= measured.shared_limit, name
        assert measured.blocks_per_sm >= 1, name
        assert measured.pipe_share >= max(peer.pipe_share for peer in plain) - STATIC_SHARE_SLACK, name
    # Issue slots per tensor cycle, forward at the smallest rank: at least those of the best plain product.
    best = max(peers.tensor_per_issue(peer) for peer in plain)
    assert peers.tensor_per_issue(metrics["y-r16"]) >= best - STATIC_SHARE_SLACK
