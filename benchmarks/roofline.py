"""What this machine can do, measured here: the floor of a case is max(bytes / bandwidth, FLOP / rate)."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.timing import cpu_clock, gpu_clock

SIZE = 2048
STREAM_BYTES = 256 << 20
SECONDS = 1.0


@dataclass(frozen=True)
class Roofline:
    """bandwidth in bytes/s (copy: read and written), rates in FLOP/s by dtype, of one CPU thread or of the GPU."""

    bandwidth: float
    rates: dict[str, float]

    def floor(self, case: Any) -> float:
        """Seconds that the case cannot beat on this machine by these two measures."""
        rate = self.rates.get(case.dtype, max(self.rates.values()))
        return max(case.bytes() / self.bandwidth, case.flops() / rate)

    def bound(self, case: Any) -> str:
        """Which of the two it is: "memory" or "arithmetic"."""
        rate = self.rates.get(case.dtype, max(self.rates.values()))
        return "memory" if case.bytes() / self.bandwidth > case.flops() / rate else "arithmetic"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured(device: torch.device) -> Roofline:
    """Copy bandwidth of a buffer larger than the caches, and the rate of a 2048^3 product in every dtype; one CPU thread."""
    clock = gpu_clock if device.type == "cuda" else cpu_clock
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source = torch.ones(STREAM_BYTES // 4, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * STREAM_BYTES / _least(lambda: target.copy_(source), clock)
        rates = {}
        for dtype in ("float32", "bfloat16", "float16") if device.type == "cuda" else ("float32", "bfloat16"):
            a = torch.randn(SIZE, SIZE, device=device).to(getattr(torch, dtype))
            rates[dtype] = 2.0 * SIZE**3 / _least(lambda a=a: a @ a, clock)
    finally:
        torch.set_num_threads(before)
    return Roofline(bandwidth, rates)


def _least(step, clock) -> float:
    """The 20th percentile of seconds per call: what the machine does when it is not disturbed."""
    step()
    times, end = [], time.monotonic() + SECONDS
    while time.monotonic() < end or len(times) < 5:
        times.append(clock(step, 1))
    return statistics.quantiles(times, n=5, method="inclusive")[0]
