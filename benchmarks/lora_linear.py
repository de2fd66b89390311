"""One LoRA linear, forward and backward, on the CPU: fastpeft beside Hugging Face PEFT's own module and the frozen base.

    python -m benchmarks.lora_linear [--quick] [--threads 1] [--json benchmarks/results/NAME.json]

One process, the three providers interleaved, process CPU time, medians. The floor is the frozen base: y = x w^T and
dx = dy w, 4 M N K FLOP. LoRA adds 6 M R (N + K) FLOP: R = 16 at N = K = 2048 is 4.7 % more, at 576 it is 17 %.
Bytes are those that autograd keeps beside parameters; errors are of dA and dB against float64.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft import LoRALinear
from tests.saved_bytes import SavedBytes

R = 16
SCALE = 2.0


@dataclass(frozen=True)
class Case:
    """Rows, width (N = K), dtypes and dropout of one measurement."""

    m: int
    n: int
    base: str
    adapters: str
    dropout: float = 0.0

    def __str__(self) -> str:
        return f"{self.base} base, {self.adapters} adapters, N=K={self.n}, M={self.m}, dropout {self.dropout:g}"


DTYPES = [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")]
CASES = [
    Case(m, n, base, adapters, dropout)
    for dropout in (0.0, 0.1)
    for base, adapters in DTYPES
    for n in (576, 2048)
    for m in (16, 256, 1024)
]


def peft_module(base: nn.Linear, case: Case) -> nn.Module:
    """PEFT's own lora.Linear over the same base module."""
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=SCALE * R, lora_dropout=case.dropout)
    module = peft.tuners.lora.Linear(base, "default", config, r=R, lora_alpha=SCALE * R)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, case.adapters))
        parameter.requires_grad_("lora_" in name)
    return module


def providers(case: Case):
    """(input, output gradient, {name: module}) with equal weights in both LoRA modules."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.base)
    base = nn.Linear(case.n, case.n, bias=False).to(dtype).requires_grad_(False)
    ours = LoRALinear(base, r=R, lora_alpha=SCALE * R, lora_dropout=case.dropout)
    ours.lora_A.to(getattr(torch, case.adapters))
    ours.lora_B.to(getattr(torch, case.adapters))
    nn.init.normal_(ours.lora_B["default"].weight, std=0.02)
    theirs = peft_module(base, case)
    theirs.lora_A.load_state_dict(ours.lora_A.state_dict())
    theirs.lora_B.load_state_dict(ours.lora_B.state_dict())
    x = torch.randn(case.m, case.n, dtype=dtype, requires_grad=True)
    return x, torch.randn(case.m, case.n, dtype=dtype), {"base": base, "peft": theirs, "fastpeft": ours}


def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, trained: list[torch.Tensor]) -> None:
    for tensor in trained:
        tensor.grad = None
    module(x).backward(dy)


def trained_tensors(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]


def timed(case: Case, seconds: float) -> dict[str, float]:
    """Median process CPU time of a step per provider, in microseconds, over interleaved rounds of `seconds` in all."""
    x, dy, modules = providers(case)
    trained = {name: trained_tensors(module, x) for name, module in modules.items()}
    times: dict[str, list[float]] = {name: [] for name in modules}
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end or rounds < 7:
        for name, module in modules.items():
            start = time.process_time()
            step(module, x, dy, trained[name])
            if rounds >= 2:
                times[name].append(time.process_time() - start)
        rounds += 1
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def saved(case: Case) -> dict[str, int]:
    """Bytes kept for backward beside parameters and the input itself, which its producer holds anyway."""
    x, _, modules = providers(case)
    kept = {}
    for name, module in modules.items():
        with SavedBytes([*module.parameters(), x]) as watch:
            y = module(x)
            kept[name] = watch.total()
        del y
    return kept


def errors(case: Case) -> dict[str, float]:
    """Largest relative error (Frobenius norm) of dA and dB against float64, without dropout."""
    x, dy, modules = providers(Case(case.m, case.n, case.base, case.adapters))
    a, b = (p.detach().double() for p in modules["fastpeft"].parameters() if p.requires_grad)
    x64, dy64 = x.detach().double(), dy.double()
    exact = SCALE * (dy64 @ b).t() @ x64, SCALE * dy64.t() @ (x64 @ a.t())
    worst = {}
    for name in ("peft", "fastpeft"):
        trained = trained_tensors(modules[name], x)
        step(modules[name], x, dy, trained)
        grads = [tensor.grad.double() for tensor in trained[1:]]
        worst[name] = max(((got - want).norm() / want.norm()).item() for got, want in zip(grads, exact))
    return worst


def machine() -> dict[str, str]:
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    import peft

    return {
        "cpu": cpu,
        "isa": " ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def measure(case: Case, seconds: float) -> dict:
    times, kept, wrong = timed(case, seconds), saved(case), errors(case)
    return {
        **asdict(case),
        "us": {name: round(value, 1) for name, value in times.items()},
        "speedup_over_peft": round(times["peft"] / times["fastpeft"], 3),
        "ratio_to_base": round(times["fastpeft"] / times["base"], 3),
        "saved_bytes": kept,
        "relative_error": {name: float(f"{value:.2e}") for name, value in wrong.items()},
    }


def table(rows: list[dict]) -> str:
    """Markdown: losses stand beside wins."""
    lines = [
        "| base | adapters | dropout | N=K | M | base us | PEFT us | fastpeft us | speed-up | PEFT keeps | fastpeft keeps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        us, kept = row["us"], row["saved_bytes"]
        lines.append(
            f"| {row['base']} | {row['adapters']} | {row['dropout']:g} | {row['n']} | {row['m']} | {us['base']:.0f} "
            f"| {us['peft']:.0f} | {us['fastpeft']:.0f} | {row['speedup_over_peft']:.2f} "
            f"| {kept['peft'] / 1024:.0f} kB | {kept['fastpeft'] / 1024:.0f} kB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half a second per case instead of six")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows, with the machine, to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    F.linear(torch.randn(64, 64), torch.randn(64, 64))  # start the thread pool before the first case
    rows = [measure(case, 0.5 if arguments.quick else 6.0) for case in CASES]
    print(table(rows))
    if arguments.json:
        record = {"benchmark": "lora_linear", "threads": arguments.threads, "machine": machine(), "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
