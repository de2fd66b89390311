"""Measures the algorithms of the LoRA linear's products on this machine, for `fastpeft tune`.

On a GPU each candidate of y and of dx is timed with events; on a CPU the whole step of `function` and `composed` with the
process's CPU time. What the peers do is always among the candidates (addmm: Unsloth and Axolotl; composed: PEFT), so a
tuned choice is never slower than theirs by more than the measurement's noise.
"""

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from fastpeft import backend
from fastpeft.ops.algorithms import QUANTIZED, Problem, candidates, forget_choices
from fastpeft.ops.lora_gemm import decodes_in_loop, product_dx, product_y
from fastpeft.ops.tune_table import Seconds, read_table, write_table
from fastpeft.ops.weights import FrozenWeight

ROUNDS = 15
ROUNDS_BEFORE = 3
_SCALE = 2.0
_SEED = 1

Measure = Callable[[Problem, torch.device], dict[str, float]]


def problems(
    shapes: Iterable[tuple[int, int]],
    rows: Iterable[int],
    device: torch.device,
    *,
    r: int,
    dtype: torch.dtype,
    base: str = "dense",
    dropout: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> list[Problem]:
    """What has to be measured for linears of these shapes (N, K), each once."""
    products = ("step",) if device.type == "cpu" else ("y", "dx")
    if device.type == "cpu" and base in QUANTIZED:
        return []  # one algorithm there: dequantise, then the library's GEMM
    every = [
        Problem(of, base, m, n, k, r, dtype, dropout, adapter_dtype if of == "step" else None)
        for n, k in sorted(set(shapes))
        for m in sorted(set(rows))
        for of in products
    ]
    return list(dict.fromkeys(every))


def linear_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(N, K) of every linear module; the model may be on meta."""
    found = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear)}
    return sorted(found)


def tune(
    wanted: Iterable[Problem],
    device: torch.device,
    *,
    again: bool = False,
    measure: "Measure | None" = None,
    tell: Callable[[Problem, dict[str, float]], None] = lambda problem, seconds: None,
) -> Seconds:
    """Measure what the table lacks, and write it after every problem, so that an interrupted run loses one at most.

    again: measure also what the table has. Returns the whole table.
    """
    measure = measure or measure_problem
    table: Seconds = {key: dict(by_rows) for key, by_rows in read_table(device).items()}
    for problem in wanted:
        rows = str(problem.m)
        if rows in table.get(problem.key, {}) and not again:
            continue
        seconds = measure(problem, device)
        table.setdefault(problem.key, {})[rows] = seconds
        write_table(device, table)
        tell(problem, seconds)
    forget_choices()
    return table


def measure_problem(problem: Problem, device: torch.device) -> dict[str, float]:
    """{algorithm: median seconds} of one problem, the algorithms in turn."""
    runs = _step_runs(problem) if problem.of == "step" else _product_runs(problem, device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS_BEFORE + ROUNDS):
        for name, run in runs.items():
            seconds = _timed(run, device)
            if turn >= ROUNDS_BEFORE:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    module = getattr(torch, device.type)
    start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _weight(problem: Problem, device: torch.device) -> FrozenWeight:
    w = torch.randn(problem.n, problem.k, device=device, dtype=problem.dtype) * problem.k**-0.5
    if problem.base == "dense":
        return w
    if problem.base == "int8":
        from fastpeft.ops.int8 import quantize_int8

        return quantize_int8(w)
    from fastpeft.ops.nf4 import quantize_4bit

    return quantize_4bit(w, problem.base, double_quant=True)


def _product_runs(problem: Problem, device: torch.device) -> dict[str, Callable[[], object]]:
    from fastpeft.kernels.lora import lora_down

    p, w = problem, _weight(problem, device)
    threshold = 6554 if p.dropout else 0
    precision = backend.matmul_precision(device)
    rows = torch.randn(p.m, p.k if p.of == "y" else p.n, device=device, dtype=p.dtype)
    a = torch.randn(p.r, p.k, device=device, dtype=p.dtype)
    b = torch.randn(p.n, p.r, device=device, dtype=p.dtype)
    into = a if p.of == "y" else b.t()
    s = lora_down(rows, into, scale=_SCALE, seed=_SEED, threshold=0, precision=precision)
    runs = {}
    for name in candidates(p, in_loop=decodes_in_loop(w, p.dtype)):
        settings = {"scale": _SCALE, "precision": precision, "algorithm": name}
        if p.of == "y":
            runs[name] = lambda settings=settings: product_y(rows, w, s, a, b, None, **settings)
        else:
            dropout = {"seed": _SEED, "threshold": threshold}
            runs[name] = lambda settings=settings, dropout=dropout: product_dx(rows, w, s, a, b, **settings, **dropout)
    return runs


def _step_runs(problem: Problem) -> dict[str, Callable[[], object]]:
    from fastpeft.ops.lora import step_by

    p, w = problem, _weight(problem, torch.device("cpu"))
    adapter_dtype = p.adapter_dtype or p.dtype
    x = torch.randn(p.m, p.k, dtype=p.dtype, requires_grad=True)
    a = torch.randn(p.r, p.k, dtype=adapter_dtype, requires_grad=True)
    b = torch.randn(p.n, p.r, dtype=adapter_dtype, requires_grad=True)
    dy = torch.randn(p.m, p.n, dtype=p.dtype)
    threshold = 6554 if p.dropout else 0

    def step(name: str) -> None:
        y = step_by(name, x, w, a, b, None, _SCALE, _SEED, threshold)
        torch.autograd.grad(y, (x, a, b), dy)

    return {name: (lambda name=name: step(name)) for name in candidates(p, in_loop=False)}
