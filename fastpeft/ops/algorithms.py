"""Which algorithm computes a product of the LoRA linear: by a table measured on this machine, else by a roofline model.

| algorithm | base | what it does |
|---|---|---|
| epilogue | any | S by a kernel, then one GEMM whose epilogue adds S B^T; a quantised base is dequantised to scratch before |
| addmm | any | the library's GEMM, then its addmm_ for the low-rank part (what Unsloth and Axolotl do) |
| panel | quantised | as addmm, in panels of rows of W that stay in L2 between being written and being read |
| merge | quantised, no dropout | dequantise W + s B A at once, then the library's GEMM alone |
| in_loop | 4-bit | dequantise in registers inside the GEMM; W is never written |

For the CPU the products are not apart; there the choice is between `function` (one autograd.Function, lora_torch.py) and
`composed` (calls that autograd knows, as PEFT makes them), made for a whole step.

`fastpeft tune` writes the table (tune.py). Both ways of choosing are pure functions of their arguments.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fastpeft import backend

ALGORITHMS = ("epilogue", "addmm", "panel", "merge", "in_loop", "function", "composed")
QUANTIZED = ("nf4", "fp4", "int8")
STORED_BITS = {"nf4": 4.13, "fp4": 4.13, "int8": 8.0}
MEASURED_ROWS_APART = 4.0  # a measurement serves up to four times more or fewer rows


@dataclass(frozen=True)
class Problem:
    """One product: `of` is "y" (x w^T + ...), "dx" (dy w + ...) or "step" (both and the adapter's gradients, on a CPU)."""

    of: str
    base: str  # "dense", "nf4", "fp4", "int8"
    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    dropout: bool = False
    adapter_dtype: torch.dtype | None = None  # None: as dtype

    @property
    def key(self) -> str:
        """Its name in the table, without the rows."""
        adapters = "" if self.adapter_dtype in (None, self.dtype) else f"+{_short(self.adapter_dtype)}"
        dropout = "-dropout" if self.dropout else ""
        return f"{self.of}-{self.base}-{self.n}x{self.k}-r{self.r}-{_short(self.dtype)}{adapters}{dropout}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def candidates(problem: Problem, *, in_loop: bool) -> tuple[str, ...]:
    """What may compute `problem`; in_loop: the kernels can decode this storage inside the GEMM."""
    if problem.of == "step":
        return ("function", "composed")
    masked = (
        problem.of == "dx" and problem.dropout
    )  # the mask covers the low-rank part alone: one kernel, or a pass more
    names = ["epilogue"] if masked else ["epilogue", "addmm"]
    if problem.base in QUANTIZED and not masked:
        names.append("panel")
        if not problem.dropout and problem.base != "int8":
            names.append("merge")
    if in_loop and problem.base in ("nf4", "fp4"):
        names.append("in_loop")
    return tuple(names)


# -- roofline ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A GPU in the units of the model: bytes/s, FLOP/s of dense bfloat16, bytes of L2, lanes x clock of the ALUs per second."""

    bandwidth: float
    flops: float
    l2: float
    lanes: float


# FLOP per processor and clock of dense bfloat16 products, by architecture; an unknown one counts as the weakest.
_TENSOR_FLOP = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192, "sm_103": 8192, "gfx942": 2048, "gfx950": 4096}
_WEAKEST = 1024
_LANES = 128  # FP32 lanes per processor
LAUNCH = 4e-6  # seconds of GPU time that a launch costs when the queue is short
LIBRARY = 0.80  # share of the tensor rate that cuBLAS reaches on large products
TRITON = 0.72  # the same of a Triton GEMM: 90 % of cuBLAS
DECODE = 7.0  # instructions per decoded weight (tests/aot), a quarter of them hidden behind the products
L2_SPEED = 3.0  # L2 over DRAM bandwidth
_IN_LOOP_ROWS = ((64, 64), (math.inf, 256))  # up to M rows: rows per tile, each of which decodes W again


def machine_of(arch: str, processors: int, clock: float, bandwidth: float, l2: float) -> Machine:
    """clock in Hz, bandwidth in bytes/s, l2 in bytes; zeros take what a small GPU of 2020 has."""
    clock = clock or 1.4e9
    return Machine(
        bandwidth=bandwidth or 0.4e12,
        flops=processors * clock * _TENSOR_FLOP.get(arch, _WEAKEST),
        l2=l2 or 4 * 2**20,
        lanes=processors * clock * _LANES,
    )


def predicted_seconds(problem: Problem, algorithm: str, machine: Machine) -> float:
    """The time of one product: the larger of bytes / bandwidth and FLOP / rate of each pass, and the launches."""
    p, size = problem, problem.dtype.itemsize
    rate = machine.flops if p.dtype != torch.float32 else machine.flops / 8
    io = (p.m * p.k + p.m * p.n) * size
    weight = p.n * p.k * size
    product = 2.0 * p.m * p.n * p.k
    stored = p.n * p.k * STORED_BITS.get(p.base, 0.0) / 8

    def gemm(efficiency: float, from_memory: float) -> float:
        return max((io + from_memory) / machine.bandwidth, product / (rate * efficiency))

    if algorithm == "in_loop":
        tile = next(rows for limit, rows in _IN_LOOP_ROWS if p.m <= limit)
        decode = p.n * p.k * DECODE * math.ceil(p.m / tile) / machine.lanes
        if p.m <= 64:
            return max((io + stored) / machine.bandwidth, decode, product / (rate * TRITON)) + 2 * LAUNCH
        return max(gemm(TRITON, stored), decode) + product / rate * 0.1 + LAUNCH
    expand = (stored + weight) / machine.bandwidth + LAUNCH if p.base in QUANTIZED else 0.0
    again = 2.0 * p.m * p.n * size / machine.bandwidth + LAUNCH  # addmm_ reads and writes the result once more
    if algorithm == "epilogue":
        return expand + gemm(TRITON, weight) + LAUNCH
    if algorithm == "addmm":
        return expand + gemm(LIBRARY, weight) + LAUNCH + again
    if algorithm == "merge":
        adapters = 2.0 * p.n * p.k * p.r / (rate * TRITON)
        return max(expand, adapters) + gemm(LIBRARY, weight) + LAUNCH
    if algorithm == "panel":
        panels = max(1.0, math.ceil(weight / (machine.l2 / 2)))
        inside = stored / machine.bandwidth + 2.0 * weight / (machine.bandwidth * L2_SPEED)
        return inside + gemm(LIBRARY, 0.0) + again + 2 * panels * LAUNCH
    raise ValueError(f"algorithm: expected one of {ALGORITHMS[:5]}, got {algorithm!r}")


# -- choice -----------------------------------------------------------------------------------------------------------


def choose_algorithm(problem: Problem, names: Iterable[str], machine: Machine, table: "dict | None" = None) -> str:
    """The fastest of `names` by the nearest measurement in `table`, else by the model.

    table: {problem.key: {rows: {algorithm: seconds}}}, as `fastpeft tune` writes it.
    """
    names = tuple(names)
    measured = nearest(problem, table or {})
    known = [name for name in names if name in measured]
    if known:
        return min(known, key=measured.__getitem__)
    return min(names, key=lambda name: predicted_seconds(problem, name, machine))


def nearest(problem: Problem, table: dict) -> dict[str, float]:
    """{algorithm: seconds} measured at the nearest number of rows; empty where nothing near was measured."""
    by_rows = table.get(problem.key, {})
    distance = {int(rows): abs(math.log2(int(rows) / problem.m)) for rows in by_rows}
    if not distance:
        return {}
    closest = min(distance, key=lambda rows: (distance[rows], rows))
    return by_rows[str(closest)] if distance[closest] <= math.log2(MEASURED_ROWS_APART) else {}


def algorithm_for(problem: Problem, device: torch.device, *, in_loop: bool = False) -> str:
    """The algorithm of `problem` on `device`; the answer is remembered per power of two of rows."""
    rows = 1 << max(problem.m - 1, 0).bit_length()
    if backend.rehearsing():  # of a device that is not here: by the model alone, and not to be remembered
        machine = _machine.__wrapped__(device)
        return choose_algorithm(replace(problem, m=rows), candidates(problem, in_loop=in_loop), machine)
    return _chosen(replace(problem, m=rows), device.type, device.index, in_loop)


@functools.lru_cache(maxsize=65536)
def _chosen(problem: Problem, device_type: str, index: int | None, in_loop: bool) -> str:
    from fastpeft.ops.tune_table import read_table

    device = torch.device(device_type, index)
    return choose_algorithm(problem, candidates(problem, in_loop=in_loop), _machine(device), read_table(device))


@functools.cache
def _machine(device: torch.device) -> Machine:
    facts = backend.gpu_facts(device)
    return machine_of(facts.arch, facts.processors, facts.clock, facts.bandwidth, facts.l2)


# Small calls cost their dispatch, not their products: plain calls, whose backward is C++, then beat a Function, whose
# backward is Python (0.19 ms more a call). Where they cross, one thread, AMX CPU, forward + backward, PEFT's time over ours:
#   a, b in x's dtype    576 x 576: Function 0.97 / 1.04 / 1.00 at M = 256 / 512 / 1024, composed 1.02 / 1.49 / 1.04
#                        2048 x 2048: 0.88 / 0.95 / 1.09 at M = 64 / 256 / 1024, composed 1.05 / 1.00 / 1.13
#   float32 a, b over bfloat16, 576 x 576: Function 0.57 / 0.72 / 1.03 / 1.89 at M = 16 / 64 / 256 / 1024, composed 0.92 / 1.09
#                        at M = 16 / 64
# Both keep the same bytes where the dtypes agree; in mixed dtypes and with dropout composed calls keep copies of x.
COMPOSED_MULTIPLIES = 2**28  # M N K, dtypes alike, no dropout
COMPOSED_ROWS_MIXED = 64
COMPOSED_ROWS_DROPOUT = 16


@functools.lru_cache(maxsize=4096)
def composed_is_faster(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype, dropout: bool
) -> bool:
    """Whether `composed` beats `function` for a step over a dense base: as measured on this machine, else as above."""
    from fastpeft.ops.tune_table import read_table

    problem = Problem("step", "dense", m, n, k, r, dtype, dropout, None if adapter_dtype == dtype else adapter_dtype)
    measured = nearest(problem, read_table(torch.device("cpu")))
    if measured:
        return min(measured, key=measured.__getitem__) == "composed"
    if dropout:
        return m <= COMPOSED_ROWS_DROPOUT
    if adapter_dtype != dtype:
        return m <= COMPOSED_ROWS_MIXED
    return m * n * k <= COMPOSED_MULTIPLIES


def forget_choices() -> None:
    """Choose anew: after a table was written."""
    _chosen.cache_clear()
    composed_is_faster.cache_clear()
