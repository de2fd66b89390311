"""Latency of fastpeft serve over loopback under concurrent requests for different adapters.

    python -m benchmarks.serving --model FOLDER [--requests 200] [--concurrency 50] [--new 32] [--max-batch 16 1]
                                 [--dtype float32] [--json FILE]

Two LoRA adapters (r = 8 on all linears) with drawn values are made beside the base model, and `fastpeft serve` is started with
them in a process of its own, once for each --max-batch; 1 is a server that never mixes. Every client sends one request after the
other, greedily decoded to --new tokens, its adapter by turns: two adapters and the base. Before that each adapter answers each
prompt alone, one request at a time; an answer under load that differs from it is counted. Latencies are the client's wall time.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.machine import machine
from fastpeft import LoraConfig, get_peft_model

PROMPTS = (
    "Describe what the function does: def add(a, b): return a + b",
    "Write one sentence about the sea.",
    "List three colours, then three animals, and say for each animal which of the colours it has most often.",
    "Why is the sky blue?",
)
ADAPTERS = ("one", "two")
NAMES = (*ADAPTERS, "__base__")


def make_adapters(model: str, folder: Path) -> dict[str, Path]:
    """Adapters that change what the model says."""
    from transformers import AutoModelForCausalLM

    made = {}
    for seed, name in enumerate(ADAPTERS):
        base = AutoModelForCausalLM.from_pretrained(model)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
        adapted.save_pretrained(folder / name)
        made[name] = folder / name
    return made


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """{"p50", "p90", "p99", "max"} by the nearest rank."""
    ordered = sorted(seconds)
    ranks = {
        name: ordered[max(0, -(-len(ordered) * share // 100) - 1)]
        for name, share in (("p50", 50), ("p90", 90), ("p99", 99))
    }
    return ranks | {"max": ordered[-1]}


async def load(url: str, requests: int, concurrency: int, new: int) -> dict[str, Any]:
    """Answers and latencies of `requests` requests from `concurrency` clients, against the answers one by one."""
    work = [(NAMES[index % len(NAMES)], PROMPTS[index // len(NAMES) % len(PROMPTS)]) for index in range(requests)]
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask(name: str, prompt: str) -> tuple[float, int, dict]:
            began = time.perf_counter()
            answer = await client.post("/generate", json={"adapter": name, "prompt": prompt, "max_new_tokens": new})
            return time.perf_counter() - began, answer.status_code, answer.json()

        alone = {one: await ask(*one) for one in dict.fromkeys(work)}
        queue, found = list(reversed(list(enumerate(work)))), {}

        async def one_client() -> None:
            while queue:
                index, one = queue.pop()
                found[index] = await ask(*one)

        before = await batches(client)
        began = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(concurrency)))
        wall = time.perf_counter() - began
        after = await batches(client)
    good = [index for index, (_, code, _) in found.items() if code == 200]
    tokens = sum(found[index][2]["generated_tokens"] for index in good)
    return {
        "requests": requests,
        "errors": requests - len(good),
        "other_than_alone": sum(found[index][2]["text"] != alone[work[index]][2]["text"] for index in good),
        "texts_alone": len({alone[one][2]["text"] for one in alone}),
        "alone_p50_s": statistics.median(seconds for seconds, _, _ in alone.values()),
        **{f"{name}_s": value for name, value in percentiles([found[index][0] for index in good]).items()},
        "requests_per_s": requests / wall,
        "tokens_per_s": tokens / wall,
        "mean_batch": (after[0] - before[0]) / max(1.0, after[1] - before[1]),
    }


async def batches(client: httpx.AsyncClient) -> tuple[float, float]:
    """Rows and batches so far, of /metrics."""
    lines = (await client.get("/metrics")).text.splitlines()
    values = {
        name: float(value) for name, _, value in (line.partition(" ") for line in lines if line[:1] != "#") if value
    }
    return values["fastpeft_batch_size_sum"], values["fastpeft_batch_size_count"]


def measure(model: str, adapters: dict[str, Path], max_batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One server, one load."""
    command = [
        sys.executable,
        "-m",
        "fastpeft",
        "serve",
        "--model",
        model,
        "--port",
        "0",
        "--max-batch",
        str(max_batch),
    ]
    command += [
        "--max-queue",
        str(options.concurrency),
        "--adapter",
        *(f"{name}={path}" for name, path in adapters.items()),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("serving"))
            url = line.split(" on ")[1].split(";")[0]
            found = asyncio.run(load(url, options.requests, options.concurrency, options.new))
        finally:
            process.terminate()
    return {"max_batch": max_batch, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    names = [name for name in rows[0] if name != "texts_alone"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--max-batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(options.model, Path(folder))
        rows = []
        for max_batch in options.max_batch:
            rows.append(measure(options.model, adapters, max_batch, options))
            print(table(rows), flush=True)
    if options.json:
        record = {
            "machine": machine(),
            "model": Path(options.model).name,
            "new_tokens": options.new,
            "dtype": options.dtype,
            "rows": rows,
        }
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
