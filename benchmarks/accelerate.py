"""What fastpeft.accelerate makes of a whole training step on the CPU, beside Hugging Face PEFT on the same model.

    python -m benchmarks.accelerate [--only CASE ...] [--model FOLDER] [--quick] [--json benchmarks/results/accelerate_cpu.json]
    python -m benchmarks.accelerate --curves
    python -m benchmarks.accelerate --products [--only CASE ...]
    python -m benchmarks.accelerate --device cuda [--batch 1 --length 4096]

SmolLM2-135M's shape with random weights, or the model of a folder; LoRA of rank 16 on all seven linears, AdamW, 4 x 256 tokens.
One process, providers interleaved, medians; a ratio is the median of the rounds' own ratios to PEFT. Step times are process CPU
time of one thread, then wall clock with two. Bytes are those that autograd keeps beside parameters. Peak memory is a child
process's resident high-water mark during steps, after building (VmHWM, Linux). Every provider takes the same steps on the same
batch from the same values; with dropout the masks differ. Accelerated models step inside `fast_matmul()`; in float32, PEFT is
measured inside it, too. On a GPU times are wall clock around synchronised steps, and peaks the allocator's. `--curves` shows
instead that results are the same: see benchmarks/curves.py. `--products` shows how much of the accelerated step is matrix
products, which no code around them can save.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastpeft
from benchmarks.machine import machine
from benchmarks.step import Case, Trained, frozen, ratio, with_fastpeft, with_peft
from fastpeft.ops.fast_matmul import fast_float32_matmul, float32_path

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "use_cache": False,
}
CPU = torch.device("cpu")
RESULTS = Path("benchmarks/results/accelerate_cpu.json")
UNCOUNTED = 2
"""Rounds: a virtual machine's second core comes up over several steps."""
PARTS = ("forward", "backward", "optimizer")

CASES = {
    str(case): case
    for case in (
        Case("float32"),
        Case("float32", dropout=0.05),
        Case("bfloat16"),
        Case("bfloat16", dropout=0.05),
        Case("bfloat16", quant="nf4"),
        Case("bfloat16", dora=True),
    )
}

GOALS = [
    ("lora_bf16", "cpu_speedup", ">=", 1.4),
    ("qlora_nf4_bf16", "cpu_speedup", ">=", 1.4),
    ("lora_bf16_dropout0.05", "cpu_speedup", ">=", 1.6),
    ("lora_fp32", "cpu_speedup", ">=", 1.7),
    *((case, "wall_speedup", ">=", 1.5) for case in CASES),
    *((case, "saved_ratio", "<=", 0.45) for case in CASES),
    *((case, "peak_ratio", "<=", 0.65) for case in CASES),
]
"""(case, figure of PEFT's model accelerated, bound): what issue 6 asks of this table."""


def synchronised() -> float:
    """Wall clock after all that the GPU was given is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Entrant(Trained):
    """A provider's model with what is around its steps."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, around: Callable[[], Any] = contextlib.nullcontext):
        super().__init__(model, ids)
        self.around = around
        self.steps, self.loss = 0, float("nan")

    def timed(self, clock: Callable[[], float]) -> dict[str, float]:
        """Seconds of one step's parts."""
        with self.around():
            marks = [clock()]
            loss = self.forward()
            marks.append(clock())
            loss.backward()
            marks.append(clock())
            self.update()
            marks.append(clock())
        self.steps, self.loss = self.steps + 1, loss.item()
        return {name: after - before for name, before, after in zip(PARTS, marks, marks[1:], strict=False)}


def accelerated(model: nn.Module, ids: torch.Tensor) -> Entrant:
    return Entrant(model, ids, fastpeft.accelerate(model).fast_matmul)


@dataclass(frozen=True)
class Provider:
    """One row per case. only: the dtype of base that it is measured for, or ""."""

    title: str
    make: Callable[[Case, Callable[[], nn.Module], torch.Tensor], Entrant]
    only: str = ""


PROVIDERS = {
    "frozen": Provider("frozen base", lambda case, make, ids: Entrant(frozen(case, make), ids)),
    "peft": Provider("PEFT", lambda case, make, ids: Entrant(with_peft(case, make), ids)),
    "peft_onednn": Provider(
        "PEFT inside fast_float32_matmul",
        lambda case, make, ids: Entrant(with_peft(case, make), ids, functools.partial(fast_float32_matmul, CPU)),
        "float32",
    ),
    "peft_accelerated": Provider(
        "PEFT + fastpeft.accelerate", lambda case, make, ids: accelerated(with_peft(case, make), ids)
    ),
    "fastpeft_accelerated": Provider(
        "fastpeft.get_peft_model + accelerate", lambda case, make, ids: accelerated(with_fastpeft(case, make), ids)
    ),
}


def smollm(folder: str | None = None, layers: int | None = None) -> nn.Module:
    """The model of a folder, or random weights of SmolLM2-135M's shape; with its first `layers` only."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if folder:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, use_cache=False)
    shape = SMOLLM2_135M | ({"num_hidden_layers": layers} if layers else {})
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def draw_adapters(model: nn.Module) -> None:
    """The same values for every provider: A is drawn in the order of the modules, B is zero from the start."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.data.copy_(values)


def entrant(name: str, case: Case, make: Callable[[], nn.Module], ids: torch.Tensor) -> Entrant:
    """The provider's model on the device of ids."""
    made = PROVIDERS[name].make(case, lambda: make().to(ids.device), ids)
    draw_adapters(made.model)
    return made


def batch(vocabulary: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def measure(
    case: Case, make: Callable[[], nn.Module], ids: torch.Tensor, rounds: int, wall_threads: int = 2
) -> list[dict]:
    """One row per provider, without peaks."""
    names = [name for name, provider in PROVIDERS.items() if provider.only in ("", case.base)]
    entrants = {name: entrant(name, case, make, ids) for name in names}
    kept = {name: one.saved_bytes() for name, one in entrants.items()}
    cpu = _interleaved(entrants, rounds, 1, synchronised if ids.is_cuda else time.process_time)
    wall = _interleaved(entrants, rounds, wall_threads, time.perf_counter) if wall_threads else None
    rows = []
    for name, one in entrants.items():
        step = [sum(parts.values()) for parts in cpu[name]]
        row = {
            "case": str(case),
            "provider": name,
            "cpu_ms": {part: _ms([parts[part] for parts in cpu[name]]) for part in PARTS} | {"step": _ms(step)},
            "saved_MB": round(kept[name] / 2**20, 1),
            "steps": one.steps,
            "loss": round(one.loss, 5),
            "cpu_speedup": _speedup(cpu["peft"], cpu[name]),
            "saved_ratio": round(kept[name] / kept["peft"], 3),
        }
        if wall is not None:
            row["wall_ms"] = _ms([sum(parts.values()) for parts in wall[name]])
            row["wall_speedup"] = _speedup(wall["peft"], wall[name])
        rows.append(row)
    return rows


def _interleaved(entrants: dict[str, Entrant], rounds: int, threads: int, clock: Callable[[], float]) -> dict:
    """Seconds of every provider's steps, by round; the first UNCOUNTED rounds are not among them."""
    torch.set_num_threads(threads)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in entrants}
    for _ in range(rounds + UNCOUNTED):
        for name, one in entrants.items():
            times[name].append(one.timed(clock))
    torch.set_num_threads(1)
    return {name: values[UNCOUNTED:] for name, values in times.items()}


def _ms(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 1)


def _speedup(of_peft: list[dict[str, float]], of_this: list[dict[str, float]]) -> float:
    return ratio([sum(parts.values()) for parts in of_peft], [sum(parts.values()) for parts in of_this])


PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}


def products_share(one: Entrant) -> float:
    """Part of a step that is in matrix products on the CPU, by PyTorch's profiler; attention's fused ones are not among them."""
    from torch.profiler import ProfilerActivity, profile

    one.timed(time.process_time)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        one.timed(time.process_time)
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(its for name, its in times.items() if name in PRODUCTS) / sum(times.values())


# ---- peak memory, in a process of its own -----------------------------------------------------------------------------


def peak_mb(name: str, case: Case, make: Callable[[], nn.Module], ids: torch.Tensor, steps: int = 3) -> float:
    """Resident high-water mark of `steps` steps but the first, in 2^20 bytes; building is not part of it."""
    one = entrant(name, case, make, ids)
    one.timed(time.process_time)
    gc.collect()
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        one.timed(synchronised)
        return torch.cuda.max_memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(steps - 1):
        one.timed(time.process_time)
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024


def add_peaks(rows: list[dict], options: list[str]) -> None:
    """peak_MB and peak_ratio of every row, each measured by this command in a child process."""
    for row in rows:
        child = ["--child", row["provider"], "--only", row["case"], *options]
        command = [sys.executable, "-m", "benchmarks.accelerate", *child]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-2000:]}")
        row["peak_MB"] = round(json.loads(done.stdout.splitlines()[-1])["peak_MB"], 1)
    peft = next(row["peak_MB"] for row in rows if row["provider"] == "peft")
    for row in rows:
        row["peak_ratio"] = round(row["peak_MB"] / peft, 3)


# ---- what is printed -----------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """Markdown, a row per case and provider; behind a slash the ratio to PEFT: times as speed-up, bytes as part."""
    lines = [
        "| case | model | step, CPU ms | forward + backward + optimizer | 2 threads, wall ms | saved MB | peak MB | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu = row["cpu_ms"]
        parts = " + ".join(f"{cpu[part]:.0f}" for part in PARTS)
        wall = f"{row['wall_ms']:.0f} / {row['wall_speedup']:.2f}" if "wall_ms" in row else "-"
        peak = f"{row['peak_MB']:.0f} / {row['peak_ratio']:.2f}" if "peak_MB" in row else "-"
        lines.append(
            f"| {row['case']} | {PROVIDERS[row['provider']].title} | {cpu['step']:.0f} / {row['cpu_speedup']:.2f} | {parts} "
            f"| {wall} | {row['saved_MB']:.0f} / {row['saved_ratio']:.2f} | {peak} "
            f"| {row['loss']:.3f} |"
        )
    return "\n".join(lines)


def goals(rows: list[dict]) -> list[str]:
    """A line for every goal whose case and figure are among the rows: met or not."""
    found = {row["case"]: row for row in rows if row["provider"] == "peft_accelerated"}
    lines = []
    for case, figure, relation, bound in GOALS:
        if figure in found.get(case, {}):
            value = found[case][figure]
            met = value >= bound if relation == ">=" else value <= bound
            lines.append(f"{'met' if met else 'NOT MET':8} {case} {figure} {value:.2f} {relation} {bound}")
    return lines


def record_of(rows: list[dict], path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The file's contents with these rows: cases that were measured before, under the same settings, stay."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    measured = {row["case"] for row in rows}
    here = machine(torch.device(settings.get("device", "cpu")))
    if before.get("settings") == settings and before.get("machine") == here:
        rows = [*(row for row in before["rows"] if row["case"] not in measured), *rows]
    order = list(CASES)
    rows = sorted(rows, key=lambda row: (order.index(row["case"]), list(PROVIDERS).index(row["provider"])))
    return {"benchmark": "accelerate", "machine": here, "settings": settings, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--model", help="folder of a causal language model; default: random weights of SmolLM2-135M's shape"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--no-wall", action="store_true", help="CPU time only: wall time says nothing on a busy machine"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--quick", action="store_true", help="two layers, 2 x 32 tokens, one round, no peaks: does it run?"
    )
    parser.add_argument("--json", type=Path, help="also write the rows, with the machine, to this file")
    parser.add_argument("--curves", action="store_true", help="the equality evidence instead of the table")
    parser.add_argument("--products", action="store_true", help="the part of matrix products in a step instead")
    parser.add_argument("--steps", type=int, default=50, help="of --curves")
    parser.add_argument("--child", choices=PROVIDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.curves:
        from benchmarks.curves import run

        run(arguments.steps, arguments.json, quick=arguments.quick)
        return
    size = (2, 32) if arguments.quick else (arguments.batch, arguments.length)
    make = functools.partial(smollm, arguments.model, 2 if arguments.quick else None)
    ids = batch(make().config.vocab_size if arguments.model else SMOLLM2_135M["vocab_size"], *size)
    ids = ids.to(arguments.device)
    if arguments.products:
        for name in arguments.only:
            share = products_share(entrant("peft_accelerated", CASES[name], make, ids))
            print(f"{name}: {share:.0%} of the accelerated step is matrix products", flush=True)
        return
    if arguments.child:
        print(json.dumps({"peak_MB": peak_mb(arguments.child, CASES[arguments.only[0]], make, ids)}))
        return
    rounds = 1 if arguments.quick else arguments.rounds
    settings = {"model": arguments.model or "random", "tokens": size, "rounds": rounds, "quick": arguments.quick}
    settings |= {"device": arguments.device}
    settings = json.loads(json.dumps(settings | {"float32_products": float32_path(CPU).why}))
    options = [
        "--batch",
        str(size[0]),
        "--length",
        str(size[1]),
        "--device",
        arguments.device,
        *(["--model", arguments.model] if arguments.model else []),
    ]
    rows: list[dict] = []
    for name in arguments.only:
        of_case = measure(CASES[name], make, ids, rounds, 0 if arguments.no_wall or ids.is_cuda else 2)
        gc.collect()
        if not arguments.quick:
            add_peaks(of_case, options)
        rows += of_case
        print("\n".join(table(of_case).splitlines()[2 if len(rows) > len(of_case) else 0 :]), flush=True)
        if arguments.json:
            record = record_of(rows, arguments.json, settings)
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not arguments.quick:
        print("\n".join(goals(rows)))


if __name__ == "__main__":
    main()
