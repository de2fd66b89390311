"""Latency of fastpeft serve over loopback under concurrent requests for different adapters, and whose answers they are.

    python -m benchmarks.serving --model FOLDER [--requests 150] [--concurrency 50] [--new 16] [--max-batch 16 1]
                                 [--dtype float32] [--json FILE]

Two LoRA adapters (r = 8 on all linears) with drawn values are made beside the base model, and `fastpeft serve` is started with
them in a process of its own, once for each --max-batch; 1 is a server that never mixes. Every client sends one request after the
other, greedily decoded to --new tokens, its adapter by turns: two adapters and the base. Latencies are the client's wall time; an
answer comes whole, so there is no time to a first token.

An answer is of the right adapter where it is likelier under that adapter than under the other and under the base, each computed
by itself, in float32, in this process. That does not ask for equal texts, which rounding alone can change where two tokens are
nearly as likely. Told apart are requests whose answer alone is likeliest under its own adapter; only these are checked. How many
texts differ from those of the same requests one by one is counted beside it.
"""

import argparse
import asyncio
import contextlib
import json
import math
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
from fastpeft import LoraConfig, PeftModel, get_peft_model

RESULTS = "benchmarks/results/serving_cpu.json"
PROMPTS = (
    "Describe what the function does: def add(a, b): return a + b",
    "The sea was calm that morning, and",
    "List three colours, then three animals, and say for each animal which of the colours it has most often.",
    "Why is the sky blue?",
)
ADAPTERS = ("one", "two")
NAMES = (*ADAPTERS, "__base__")
SPREAD = 0.3
"""Standard deviation of the adapters' B: each says something of its own, and none repeats one token."""


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
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
        adapted.save_pretrained(folder / name)
        made[name] = folder / name
    return made


class Judge:
    """Whose answer a text is: log-likelihoods under every adapter, one row and one adapter at a time."""

    def __init__(self, model: str, adapters: dict[str, Path]):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = PeftModel(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
        for name, folder in adapters.items():
            self.model.load_adapter(folder, name)
        self.model.eval()
        self.known: dict[tuple, dict[str, float]] = {}

    def margin(self, name: str, prompt: str, answer: dict[str, Any]) -> float:
        """log p(answer | prompt) under `name`, less the highest under another: above 0, it is the answer of `name`."""
        key = prompt, tuple(answer["tokens"]), answer["finish_reason"]
        if key not in self.known:
            self.known[key] = self._likelihoods(*key)
        found = self.known[key]
        return found[name] - max(value for other, value in found.items() if other != name)

    @torch.no_grad()
    def _likelihoods(self, prompt: str, tokens: tuple[int, ...], reason: str) -> dict[str, float]:
        before = self.tokenizer(prompt)["input_ids"]
        said = [*tokens, *([self.tokenizer.eos_token_id] if reason == "stop" else [])]
        ids = torch.tensor([before + said])
        found = {}
        for name in NAMES:
            self.model.set_adapter(ADAPTERS[0] if name not in ADAPTERS else name, inference_mode=True)
            with contextlib.nullcontext() if name in ADAPTERS else self.model.disable_adapter():
                log_p = self.model(input_ids=ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
            found[name] = log_p.gather(1, ids[0, len(before) :, None]).sum().item()
        return found


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """{"p50", "p90", "p99", "max"} by the nearest rank."""
    ordered = sorted(seconds)
    ranks = {
        name: ordered[max(0, -(-len(ordered) * share // 100) - 1)]
        for name, share in (("p50", 50), ("p90", 90), ("p99", 99))
    }
    return ranks | {"max": ordered[-1]}


async def load(url: str, requests: int, concurrency: int, new: int, judge: Judge) -> dict[str, Any]:
    """Answers and latencies of `requests` requests from `concurrency` clients, and whose answers they are.

    Raises:  ValueError where even the answers one by one do not tell the adapters apart
    """
    work = [(NAMES[index % len(NAMES)], PROMPTS[index // len(NAMES) % len(PROMPTS)]) for index in range(requests)]
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask(name: str, prompt: str) -> tuple[float, int, dict]:
            began = time.perf_counter()
            asked = {"adapter": name, "prompt": prompt, "max_new_tokens": new, "return_tokens": True}
            answer = await client.post("/generate", json=asked)
            return time.perf_counter() - began, answer.status_code, answer.json()

        alone = {one: await ask(*one) for one in dict.fromkeys(work)}
        telling = {one for one, (_, code, answer) in alone.items() if code == 200 and judge.margin(*one, answer) > 0}
        mute = {name for name, _ in work} - {name for name, _ in telling}
        if mute:
            raise ValueError(
                f"load: expected answers that tell the adapters apart, got none alone of {sorted(mute)}; take a larger --new"
            )
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
    checked = [index for index in good if work[index] in telling]
    margins = [judge.margin(*work[index], found[index][2]) for index in checked]
    tokens = sum(found[index][2]["generated_tokens"] for index in good)
    return {
        "requests": requests,
        "concurrency": concurrency,
        "errors": requests - len(good),
        "checked": len(checked),
        "wrong_adapter": sum(
            margin <= 0 or found[index][2]["adapter"] != work[index][0] for index, margin in zip(checked, margins)
        ),
        "smallest_margin": min(margins, default=math.nan),
        "other_text_than_alone": sum(found[index][2]["text"] != alone[work[index]][2]["text"] for index in good),
        "alone_p50_s": statistics.median(seconds for seconds, _, _ in alone.values()),
        **{f"{name}_s": value for name, value in percentiles([found[index][0] for index in good]).items()},
        "requests_per_s": len(good) / wall,
        "tokens_per_s": tokens / wall,
        "batches": {size: int(count - before[size]) for size, count in after.items() if count > before[size]},
    }


async def batches(client: httpx.AsyncClient) -> dict[str, float]:
    """Batches so far by their number of rows, of /metrics: {"1": 4, "2": 0, "3 to 4": 1, ...}."""
    lines = (await client.get("/metrics")).text.splitlines()
    rows = [line.split('le="')[1].split('"} ') for line in lines if line.startswith("fastpeft_batch_size_bucket")]
    found, least, below = {}, 1, 0.0
    for most, count in rows:
        size = math.inf if most == "+Inf" else int(float(most))
        name = f"{least}" if least == size else f"{least} or more" if size == math.inf else f"{least} to {size}"
        found[name], least, below = float(count) - below, size + 1, float(count)
    return found


def measure(
    model: str, adapters: dict[str, Path], max_batch: int, options: argparse.Namespace, judge: Judge
) -> dict[str, Any]:
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
        "--dtype",
        options.dtype,
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
            found = asyncio.run(load(url, options.requests, options.concurrency, options.new, judge))
        finally:
            process.terminate()
    return {"max_batch": max_batch, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """For people, and for README."""
    names = {
        "max_batch": "--max-batch", "requests": "requests", "concurrency": "at once", "errors": "errors",
        "checked": "told apart", "wrong_adapter": "of these wrong",
        "other_text_than_alone": "other text than alone", "alone_p50_s": "alone p50, s",
        "p50_s": "p50, s", "p90_s": "p90, s", "p99_s": "p99, s", "tokens_per_s": "tokens/s",
    }  # fmt: skip
    lines = ["| " + " | ".join([*names.values(), "rows of a batch: batches"]) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        cells.append(", ".join(f"{size}: {count}" for size, count in row["batches"].items()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--max-batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(options.model, Path(folder))
        judge = Judge(options.model, adapters)
        rows = []
        for max_batch in options.max_batch:
            rows.append(measure(options.model, adapters, max_batch, options, judge))
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
