"""One way to take times, for every provider of a case.

Providers run in turn, round after round, every second round backwards (ABBA), so that a drift within a round falls on all; who is
first turns with the rounds. A ratio is the median of the rounds' own ratios, so that what slows a round slows both. Before each
sample the caches are flushed by writing a buffer larger than them.

CPU   process CPU time with one thread. The allocator keeps what is freed, up to 32 MiB at once: else a step's pages are mapped
      anew or not by what ran before it, a fifth of a short step's time. On request also wall time with all threads, which means
      something on a quiet machine only
GPU   events; a step too short for its launches is captured as a CUDA graph where that can be done
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 2
LEAST_ROUNDS = 7
LONG_STEP = 0.5
"""Steps that take more than this many seconds in all are warmed up by one call and timed in LONG_ROUNDS rounds at least."""
LONG_ROUNDS = 5
SAMPLE_SECONDS = 2e-4
"""A sample repeats a shorter step until it takes about as long as this."""
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}

Step = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds per step of one provider, one value a round."""

    samples: tuple[float, ...]

    def microseconds(self) -> list[float]:
        """The 20th, 50th and 80th percentile."""
        cuts = statistics.quantiles(self.samples, n=5, method="inclusive")
        return [round(value * 1e6, 2) for value in (cuts[0], statistics.median(self.samples), cuts[3])]


def ratio(above: Times, below: Times) -> float:
    """Median over rounds of above / below."""
    return statistics.median(one / two for one, two in zip(above.samples, below.samples, strict=True))


def interleaved(
    steps: dict[str, Step], seconds: float, clock: Callable[[Step, int], float], flush: Step
) -> dict[str, Times]:
    """Times of every step, over rounds that take about `seconds` in all. clock(step, n): seconds of n steps."""
    names = list(steps)
    begun = time.monotonic()
    for step in steps.values():
        step()
    long = time.monotonic() - begun > LONG_STEP
    for step in () if long else steps.values():
        for _ in range(WARM_UP - 1):
            step()
    least = LONG_ROUNDS if long else LEAST_ROUNDS
    repeats = {name: max(1, int(SAMPLE_SECONDS / max(clock(steps[name], 1), 1e-7))) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    end, number = time.monotonic() + seconds, 0
    while number < least or time.monotonic() < end:
        for name in order(names, number):
            flush()
            samples[name].append(clock(steps[name], repeats[name]) / repeats[name])
        number += 1
    return {name: Times(tuple(values)) for name, values in samples.items()}


def order(names: list[str], number: int) -> list[str]:
    """The turns of a round: another first every second round, and the same turns backwards in between."""
    turn = number // 2 % len(names)
    turned = names[turn:] + names[:turn]
    return turned[::-1] if number % 2 else turned


def cpu_clock(step: Step, count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        step()
    return time.process_time() - start


def wall_clock(step: Step, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - start


def gpu_clock(step: Step, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def flusher(device: torch.device) -> Step:
    """Writes a buffer larger than the device's caches."""
    size = FLUSH_BYTES["cuda" if device.type == "cuda" else "cpu"]
    buffer = torch.empty(size, dtype=torch.int8, device=device)
    return buffer.zero_


def as_graph(step: Step, device: torch.device) -> Step:
    """The step as one CUDA graph, or the step itself where it cannot be captured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP + 1):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        return step
    return graph.replay


def keep_freed_memory() -> None:
    """Tell glibc to hand no memory back until the process ends; another library is left alone."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 32 << 20)


def times_of(
    steps: dict[str, Step], device: torch.device, seconds: float, *, small: bool = False, wall: bool = False
) -> dict[str, dict[str, Times]]:
    """{"cpu" | "wall" | "gpu": {name: Times}}. small: capture graphs on a GPU; wall: a second pass on a CPU, with all threads."""
    if device.type == "cuda":
        run = {name: as_graph(step, device) for name, step in steps.items()} if small else steps
        return {"gpu": interleaved(run, seconds, gpu_clock, flusher(device))}
    keep_freed_memory()
    before, flush = torch.get_num_threads(), flusher(device)
    try:
        torch.set_num_threads(1)
        found = {"cpu": interleaved(steps, seconds, cpu_clock, flush)}
        torch.set_num_threads(before)
        if wall:
            found["wall"] = interleaved(steps, seconds, wall_clock, flush)
    finally:
        torch.set_num_threads(before)
    return found
