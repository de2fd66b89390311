"""Fine-tuning from end to end, fastpeft beside Hugging Face PEFT: tokens/s, peak memory and losses over sequence lengths.

    python -m benchmarks end-to-end [--quick] [--only CASE ...] [--lengths S ...] [--steps N] [--json FILE]
    python -m benchmarks end-to-end --report benchmarks/results/end_to_end_cpu.json        plots beside it, README's table

SmolLM2-135M's shape, bfloat16, LoRA of rank 16 on all seven linears: LoRA, QLoRA (NF4), DoRA; one row of S tokens a step, AdamW.
Random weights and a few layers by default, so that 8192 tokens end; `--model FOLDER` trains pretrained weights, `--model demo`
those of the demo. Text: the demo's reviews where they are there, else a Markov chain. Every provider starts from the same values
and takes the same batches in turn; `held out` is the loss of tokens that none was trained on. Times: after a step that is not
counted, process CPU time of one thread, then wall clock with two; medians, ratios of rounds; on a GPU wall clock around
synchronised steps. Peaks are a child process's (VmHWM), which runs first: a provider that fails there is a row that says so. No
ratio is shown where losses are apart.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accelerate import CASES, PROVIDERS, Entrant, entrant, peak_mb, smollm, synchronised
from benchmarks.machine import machine, named
from benchmarks.step import Case, ratio
from benchmarks.tables import markdown
from benchmarks.texts import demo_model, tokens_of

METHODS = ("lora_bf16", "qlora_nf4_bf16", "dora_bf16")
TRAINERS = ("peft", "peft_accelerated", "fastpeft_accelerated")
LENGTHS = (512, 1024, 2048, 4096, 8192)
LAYERS = 4
STEPS = 24
"""At 512 tokens; a longer row takes fewer steps, never under three: one to warm up, one for each clock."""
LOSS_BOUND = 5e-3
"""Largest relative difference of any step's loss from PEFT's with which a provider counts as training the same."""
RESULTS = Path("benchmarks/results/end_to_end_cpu.json")
QUICK = {"lengths": (32, 64), "layers": 2, "steps": 3}
SECONDS_PER_TOKEN = 2.2e-3
"""For the plan: one step of PEFT over one token, four layers, one thread of a Zen 4."""

Row = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a row; 512 to 8192 by default")
    parser.add_argument("--steps", type=int, help=f"at 512 tokens: {STEPS}; longer rows take fewer, in proportion")
    parser.add_argument("--layers", type=int, help=f"of the random model: {LAYERS} by default")
    parser.add_argument("--model", help="folder of a causal language model, or demo: pretrained weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--no-wall", action="store_true", help="CPU time only: wall time says nothing on a busy machine"
    )
    parser.add_argument("--quick", action="store_true", help="two layers, 32 and 64 tokens, no peaks: does it run?")
    parser.add_argument("--json", type=Path, help="also write everything to this file; what it has stays")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="plots and table of a results file, nothing measured"
    )
    parser.add_argument("--child", choices=TRAINERS, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Measure every method at every length; a provider's failure is a row."""
    if options.report:
        return shown(options.report)
    lengths = tuple(options.lengths or (QUICK["lengths"] if options.quick else LENGTHS))
    layers = options.layers or (QUICK["layers"] if options.quick else LAYERS)
    most = options.steps or (QUICK["steps"] if options.quick else STEPS)
    if min(*lengths, most, layers) < 1:
        raise ValueError(f"end-to-end: expected positive lengths, steps and layers, got {lengths}, {most}, {layers}")
    torch.set_num_threads(1)
    folder = demo_model() if options.model == "demo" else options.model
    make = functools.partial(smollm, folder, layers)
    device = torch.device(options.device)
    if options.child:
        ids = torch.randint(1000, (1, lengths[0]), generator=torch.Generator().manual_seed(0)).to(device)
        print(json.dumps({"peak_MB": peak_mb(options.child, CASES[options.only[0]], make, ids, steps=2)}))
        return 0
    plan = {length: steps_of(length, most) for length in lengths}
    stream, source = tokens_of(folder, max(length * (steps + 1) for length, steps in plan.items()))
    settings = {
        "model": options.model or f"random, {layers} layers",
        "text": source,
        "batch": 1,
        "steps": {str(length): steps for length, steps in plan.items()},
        "device": device.type,
        "wall": not options.no_wall,
    }
    record = started(options.json, settings, device)
    print(told(options.only, plan), flush=True)
    begun = time.monotonic()
    for number, (name, length) in enumerate([(name, length) for name in options.only for length in lengths]):
        minutes = (time.monotonic() - begun) / 60
        print(
            f"-- {number + 1} of {len(options.only) * len(lengths)}: {name}, {length} tokens, {minutes:.1f} min",
            flush=True,
        )
        child = ["--only", name, "--lengths", str(length), "--layers", str(layers), "--device", device.type]
        child += ["--model", options.model] if options.model else []
        rows = peaks(child) if not options.quick else {trainer: {} for trainer in TRAINERS}
        wall = 0 if options.no_wall or device.type == "cuda" else 2
        measure(rows, CASES[name], make, stream.to(device), length, plan[length], wall)
        rows["unsloth"] = {"absent": unsloth(device)}
        kept = [row for row in record["rows"] if (row["case"], row["tokens"]) != (name, length)]
        record["rows"] = [
            *kept,
            *({"case": name, "tokens": length, "provider": one, **row} for one, row in rows.items()),
        ]
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(table([row for row in record["rows"] if (row["case"], row["tokens"]) == (name, length)]), flush=True)
    return 0


def steps_of(length: int, most: int) -> int:
    """`most` at 512 tokens, fewer in proportion at more; three at least."""
    return max(3, min(most, most * 512 // length))


def told(names: list[str], plan: dict[int, int]) -> str:
    """What will be done, and about how long it takes with four layers on one thread."""
    per_round = {length: len(names) * len(TRAINERS) * length * SECONDS_PER_TOKEN for length in plan}
    seconds = sum((steps + 2) * per_round[length] for length, steps in plan.items())
    steps = ", ".join(f"{length} tokens x {steps}" for length, steps in plan.items())
    return (
        f"plan: {', '.join(names)}; steps: {steps}; about {seconds / 60:.0f} min with {LAYERS} layers, "
        "less where two threads run"
    )


def started(path: Path | None, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The record to add rows to: that of the file, where machine, commit and settings are the same, else a new one."""
    record = {"benchmark": "end-to-end", "machine": machine(device), "settings": settings, "rows": []}
    if path and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        here = record["machine"]["commit"].rstrip("+")
        same = before["machine"] | {"commit": before["machine"]["commit"].rstrip("+")}
        alike = before["settings"] | {"steps": {}} == settings | {"steps": {}}
        if alike and same == record["machine"] | {"commit": here}:
            before["settings"]["steps"] |= settings["steps"]
            return before
    return record


def unsloth(device: torch.device) -> str:
    """Why Unsloth is not measured here."""
    if device.type != "cuda":
        return "Unsloth needs a GPU"
    try:
        import unsloth  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return "Unsloth patches transformers for the whole process: not measured beside others"


def peaks(options: list[str]) -> dict[str, Row]:
    """{"peak_MB"} of every trainer in a process of its own, or {"failed"}: an exit code, the last line it said."""
    found: dict[str, Row] = {}
    for name in TRAINERS:
        command = [sys.executable, "-m", "benchmarks", "end-to-end", "--child", name, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["killed, out of memory?"])[-1]
            found[name] = {"failed": f"exit code {done.returncode}: {said[:200]}"}
        else:
            found[name] = {"peak_MB": round(json.loads(done.stdout.splitlines()[-1])["peak_MB"], 1)}
    return found


def measure(
    rows: dict[str, Row], case: Case, make: Any, stream: torch.Tensor, length: int, steps: int, wall_threads: int
) -> None:
    """Train every provider in `rows` that has not failed, in turn on the same batches; add times, losses and ratios."""
    batches = stream[length : length * (steps + 1)].view(steps, 1, length)
    held_out = stream[:length][None]
    entrants: dict[str, Entrant] = {}
    for name, row in rows.items():
        if "failed" not in row:
            entrants[name] = _tried(row, lambda name=name: entrant(name, case, make, batches[0]))
    cpu_rounds = (steps - 1) - ((steps - 1) // 2 if wall_threads else 0)
    times: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in rows}
    losses: dict[str, list[float]] = {name: [] for name in rows}
    for step in range(steps):
        kind = "cpu" if step <= cpu_rounds else "wall"
        clock = synchronised if stream.is_cuda else time.process_time if kind == "cpu" else time.perf_counter
        torch.set_num_threads(1 if kind == "cpu" else wall_threads)
        turn = list(entrants.items())
        for name, one in turn if step % 2 else reversed(turn):
            if one is None or "failed" in rows[name]:
                continue
            one.ids = batches[step]
            parts = _tried(rows[name], lambda one=one, clock=clock: one.timed(clock))
            if parts is not None:
                losses[name].append(one.loss)
                if step:
                    times[name][kind].append(sum(parts.values()))
    torch.set_num_threads(1)
    for name, row in rows.items():
        if "failed" in row:
            continue
        row["losses"] = [round(loss, 5) for loss in losses[name]]
        row["held_out"] = _tried(row, lambda name=name: round(_held_out(entrants[name], held_out), 5))
        for kind, its in times[name].items():
            if its:
                row[f"{kind}_tokens_per_s"] = round(length / statistics.median(its), 1)
    _beside_peft(rows, times)


def _beside_peft(rows: dict[str, Row], times: dict[str, dict[str, list[float]]]) -> None:
    """loss_difference, alike and ratios over PEFT, for every row that finished beside a PEFT that did."""
    peft = rows["peft"]
    for name, row in rows.items():
        if "failed" in row or "failed" in peft:
            continue
        pairs = [*zip(row["losses"], peft["losses"], strict=True), (row["held_out"], peft["held_out"])]
        row["loss_difference"] = round(max(abs(one - other) / abs(other) for one, other in pairs), 6)
        row["alike"] = row["loss_difference"] <= LOSS_BOUND
        for kind in ("cpu", "wall"):
            if times[name][kind]:
                row[f"{kind}_speedup"] = ratio(times["peft"][kind], times[name][kind])
        if "peak_MB" in row and "peak_MB" in peft:
            row["peak_ratio"] = round(row["peak_MB"] / peft["peak_MB"], 3)


def _tried(row: Row, call: Any) -> Any:
    """What call gives; None where it fails, and the row says why."""
    try:
        return call()
    except (RuntimeError, MemoryError, ImportError, ValueError, TypeError, NotImplementedError) as error:
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None


@torch.no_grad()
def _held_out(one: Entrant, ids: torch.Tensor) -> float:
    one.ids = ids
    model: nn.Module = one.model
    model.eval()
    with one.around():
        loss = one.forward().item()
    model.train()
    return loss


# ---- what is printed -----------------------------------------------------------------------------------------------------

HEAD = ("case", "tokens", "model", "tokens/s, CPU", "2 threads, wall", "peak MB", "loss, first to last", "held out")
TITLES = {name: PROVIDERS[name].title for name in TRAINERS} | {"unsloth": "Unsloth"}


def table(rows: list[Row]) -> str:
    """Markdown, a line per case, length and provider; behind a slash the ratio to PEFT, if the losses are alike."""
    lines = []
    for row in rows:
        head = [row["case"], str(row["tokens"]), TITLES[row["provider"]]]
        if "failed" in row or "absent" in row:
            kind = "failed" if "failed" in row else "absent"
            lines.append([*head, f"{kind}: {row[kind]}", *[""] * 4])
            continue
        learnt = f"{row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
        lines.append([*head, _rate(row, "cpu"), _rate(row, "wall"), _peak(row), learnt, f"{row['held_out']:.3f}"])
    return markdown(HEAD, lines)


def _rate(row: Row, kind: str) -> str:
    if f"{kind}_tokens_per_s" not in row:
        return "-"
    text = f"{row[f'{kind}_tokens_per_s']:.0f}"
    if not row.get("alike", False):
        return f"{text} / losses apart" if "alike" in row else text
    return f"{text} / {row[f'{kind}_speedup']:.2f}"


def _peak(row: Row) -> str:
    if "peak_MB" not in row:
        return "-"
    return f"{row['peak_MB']:.0f}" + (f" / {row['peak_ratio']:.2f}" if row.get("alike") and "peak_ratio" in row else "")


def readme_table(record: dict[str, Any]) -> str:
    """README's: without providers that are absent."""
    return table([row for row in record["rows"] if "absent" not in row])


def shown(path: Path) -> int:
    """Draw the plots of a results file beside it and print README's table."""
    from benchmarks.end_to_end_plots import draw

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"end-to-end: expected a results file, got {path}: {error}") from error
    if record.get("benchmark") != "end-to-end":
        raise ValueError(f"end-to-end: expected a results file of `end-to-end --json`, got {path}")
    for one in draw(record, path.with_suffix("")):
        print(one)
    print(f"\n{named(record['machine'])}\n\n{readme_table(record)}")
    return 0
