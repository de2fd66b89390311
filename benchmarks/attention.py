"""Attention on the CPU: fastpeft beside PyTorch's scaled_dot_product_attention and the eager form of transformers.

    python -m benchmarks.attention [--only NAME ...] [--rounds 9] [--threads 1] [--json benchmarks/results/NAME.json]

Forward and backward of one attention, [B, S, H, D] in and out, gradients of q, k, v and of a bias where it is learnt. One process
per run, the providers interleaved, process CPU time, medians; a ratio is the median of the rounds' own ratios, above 1 where
fastpeft is faster. SDPA gets what it needs made beforehand (masks, a bias as a tensor): making them is not timed. Bytes are
those that autograd keeps for backward beside q, k, v and the bias; SDPA takes its math path where a mask wants a gradient.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.lora_linear import machine
from fastpeft.ops.attention import RelativeBias, attention
from tests.saved_bytes import SavedBytes


@dataclass(frozen=True)
class Case:
    """Sizes, dtype and terms of one attention. bias: "" or what it is; backward: with the gradients."""

    batch: int
    tokens: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = False
    padded: bool = False
    window: int = 0
    softcap: float = 0.0
    bias: str = ""  # "learnt" [1, H, S, S], "fixed", "relative" (T5's table)
    backward: bool = True

    def __str__(self) -> str:
        terms = [name for name in ("causal", "padded") if getattr(self, name)]
        terms += [f"window{self.window}"] if self.window else []
        terms += [f"softcap{self.softcap:g}"] if self.softcap else []
        terms += [f"{self.bias}_bias"] if self.bias else []
        sizes = f"{self.batch}x{self.tokens}_h{self.heads}" + (
            f"_kv{self.kv_heads}" if self.kv_heads < self.heads else ""
        )
        dtype = {"float32": "fp32", "bfloat16": "bf16"}[self.dtype]
        return "_".join([sizes, f"d{self.head_dim}", dtype, *terms, "step" if self.backward else "forward"])


COVERED = [
    Case(batch, tokens, kv_heads=kv_heads, dtype=dtype, causal=causal, backward=backward)
    for dtype in ("float32", "bfloat16")
    for batch, tokens in ((16, 64), (4, 256), (1, 1024))
    for kv_heads, causal in ((8, False), (2, True))
    for backward in (False, True)
] + [Case(4, 256, padded=True), Case(1, 1024, bias="fixed"), Case(1, 4096, heads=2, kv_heads=2, causal=True)]
OTHERS = [
    Case(1, 1024, bias="learnt"),
    Case(1, 1024, bias="learnt", dtype="bfloat16"),
    Case(4, 256, bias="learnt"),
    Case(1, 1024, bias="relative"),
    Case(1, 1024, softcap=30.0, causal=True),
    Case(1, 2048, window=256, causal=True, heads=4, kv_heads=4),
]


class Inputs:
    """Tensors of a case, with the bias and the mask that SDPA and the eager form take."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        dtype, s = getattr(torch, case.dtype), case.tokens

        def normal(*shape):
            return torch.randn(*shape, dtype=dtype)

        self.case = case
        self.q = normal(case.batch, s, case.heads, case.head_dim)
        self.k, self.v = (normal(case.batch, s, case.kv_heads, case.head_dim) for _ in range(2))
        self.do = torch.randn_like(self.q)
        self.leaves = [self.q, self.k, self.v]
        self.bias = self.table = self.padding = self.mask = None
        if case.bias in ("learnt", "fixed"):
            self.bias = normal(1, case.heads, s, s)
        if case.bias == "relative":
            self.table = torch.randn(32, case.heads)
        if case.padded:
            self.padding = torch.arange(s) < torch.linspace(s // 2, s, case.batch).long()[:, None]
            self.mask = self.padding[:, None, None, :]
        if case.window:
            distance = torch.arange(s) - torch.arange(s)[:, None]
            self.mask = (distance <= 0) & (distance > -case.window)
        learnt = {"learnt": self.bias, "relative": self.table}.get(case.bias)
        self.leaves += [] if learnt is None else [learnt]
        for leaf in self.leaves:
            leaf.requires_grad_(case.backward)

    def exempt(self) -> list[torch.Tensor]:
        return [tensor for tensor in (*self.leaves, self.bias, self.mask) if tensor is not None]

    def added(self) -> torch.Tensor | None:
        """The bias [1, H, S, S]: of a table, gathered as transformers' T5 does it."""
        if self.table is None:
            return self.bias
        distance = torch.arange(self.case.tokens) - torch.arange(self.case.tokens)[:, None]
        return self.table[RelativeBias(self.table).buckets(distance)].permute(2, 0, 1)[None].to(self.q.dtype)


def with_fastpeft(x: Inputs) -> torch.Tensor:
    case = x.case
    return attention(
        x.q,
        x.k,
        x.v,
        causal=case.causal,
        window=case.window - 1 if case.window else None,
        softcap=case.softcap or None,
        bias=x.bias,
        relative_bias=None if x.table is None else RelativeBias(x.table),
        key_padding_mask=x.padding,
    )


def with_sdpa(x: Inputs) -> torch.Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))
    mask = x.mask if x.mask is not None else x.added()
    causal = x.case.causal and mask is None
    grouped = x.case.kv_heads < x.case.heads
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def with_eager(x: Inputs) -> torch.Tensor:
    case, s = x.case, x.case.tokens
    q, k, v = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v))
    k, v = (tensor.repeat_interleave(case.heads // case.kv_heads, 1) for tensor in (k, v))
    scores = q @ k.mT * case.head_dim**-0.5
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    bias = x.added()
    scores = scores if bias is None else scores + bias
    if x.mask is not None:
        scores = scores.masked_fill(~x.mask, float("-inf"))
    elif case.causal:
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def providers(case: Case) -> dict[str, Callable[[Inputs], torch.Tensor]]:
    found = {"fastpeft": with_fastpeft, "sdpa": with_sdpa, "eager": with_eager}
    if case.softcap:
        del found["sdpa"]  # it has no softcap
    if case.tokens > 2048:
        del found["eager"]
    return found


def measure(case: Case, rounds: int) -> dict:
    x = Inputs(case)
    functions = providers(case)
    kept, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        with SavedBytes(x.exempt()) as watch:
            o = function(x)
            kept[name] = watch.total()
        del o
    for number in range(rounds + 2):
        order = list(functions.items())
        turn = number % len(order)  # who comes after the eager form finds a cold cache
        for name, function in order[turn:] + order[:turn]:
            start = time.process_time()
            o = function(x)
            if case.backward:
                torch.autograd.grad(o, x.leaves, x.do)
            if number >= 2:
                times[name].append(time.process_time() - start)
            del o
    gc.collect()
    return {
        "case": str(case),
        **asdict(case),
        "ms": {name: round(statistics.median(values) * 1e3, 2) for name, values in times.items()},
        "least_ms": {name: round(min(values) * 1e3, 2) for name, values in times.items()},
        "speedup": {name: _ratio(times[name], times["fastpeft"]) for name in times if name != "fastpeft"},
        "saved_MB": {name: round(size / 2**20, 2) for name, size in kept.items()},
    }


def _ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(one / two for one, two in zip(above, below, strict=True)), 3)


def table(rows: list[dict]) -> str:
    """Markdown: losses stand beside wins."""
    lines = [
        "| case | fastpeft ms | SDPA ms | eager ms | over SDPA | over eager | fastpeft keeps | SDPA keeps | eager keeps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['ms'][name]:.2f}" if name in row["ms"] else "" for name in ("fastpeft", "sdpa", "eager")]
        cells += [f"{row['speedup'][name]:.2f}" if name in row["speedup"] else "" for name in ("sdpa", "eager")]
        saved = row["saved_MB"]
        cells += [f"{saved[name]:.1f} MB" if name in saved else "" for name in ("fastpeft", "sdpa", "eager")]
        lines.append(f"| {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    names = {str(case): case for case in (*COVERED, *OTHERS)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="CASE", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows, with the machine, to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.only:
        rows.append(measure(names[name], arguments.rounds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.json:
        record = {"benchmark": "attention", "threads": arguments.threads, "machine": machine(), "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
