"""A whole training step of a small Llama on the CPU: fastpeft beside Hugging Face PEFT and the frozen base.

    python -m benchmarks.training_step [--only NAME ...] [--rounds 9] [--threads 1] [--json benchmarks/results/NAME.json]

32 million random weights, LoRA of rank 16 on all seven linears of a layer, forward + backward + AdamW on 4 x 256 tokens. One
process per run, the three providers interleaved, process CPU time, medians; a ratio is the median of the rounds' own ratios.
The floor is the frozen base: the same model without adapters, its loss differentiated down to the embeddings. Over a quantised
base the floor stays the dense one. Bytes are those that autograd keeps for backward beside parameters.

What the floor leaves to win: the base's products are 4 M N K FLOP per linear, LoRA's 6 M R (N + K): 7.6 % more here.
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
from torch import nn

import fastpeft
from benchmarks.lora_linear import machine
from tests.saved_bytes import SavedBytes

R = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "use_cache": False,
}


@dataclass(frozen=True)
class Case:
    """One configuration: dtype and storage of the base, the adapter's options."""

    base: str
    quant: str = ""
    dropout: float = 0.0
    dora: bool = False

    def __str__(self) -> str:
        method = ("q" if self.quant else "") + ("dora" if self.dora else "lora")
        parts = [method, self.quant, {"float32": "fp32", "bfloat16": "bf16"}[self.base]]
        return "_".join(filter(None, [*parts, f"dropout{self.dropout:g}" if self.dropout else ""]))


CASES = [
    Case(base, quant, dropout, dora)
    for base in ("bfloat16", "float32")
    for quant in ("", "nf4")
    for dora in (False, True)
    for dropout in (0.0, 0.1)
]


def small_llama() -> nn.Module:
    """The 32 million random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL))


def base_model(case: Case, make: Callable[[], nn.Module] = small_llama, *, dense: bool = False) -> nn.Module:
    """The frozen model; quantised as the case says, unless it is to be dense."""
    model = make().to(getattr(torch, case.base)).requires_grad_(False)
    if case.quant and not dense:
        model = fastpeft.quantize(model, case.quant, compute_dtype=getattr(torch, case.base))
    return model


def frozen(case: Case, make: Callable[[], nn.Module] = small_llama) -> nn.Module:
    model = base_model(case, make, dense=True)
    model.enable_input_require_grads()
    return model.train()


def with_peft(case: Case, make: Callable[[], nn.Module] = small_llama) -> nn.Module:
    import peft

    return peft.get_peft_model(base_model(case, make), peft.LoraConfig(**_options(case))).train()


def with_fastpeft(case: Case, make: Callable[[], nn.Module] = small_llama) -> nn.Module:
    return fastpeft.get_peft_model(base_model(case, make), fastpeft.LoraConfig(**_options(case))).train()


def _options(case: Case) -> dict:
    return {
        "r": R,
        "lora_alpha": 2 * R,
        "lora_dropout": case.dropout,
        "use_dora": case.dora,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
    }


PROVIDERS: dict[str, Callable[[Case], nn.Module]] = {"frozen": frozen, "peft": with_peft, "fastpeft": with_fastpeft}


class Trained:
    """A model, its optimizer, and the batch that it is trained on again and again."""

    def __init__(self, model: nn.Module, ids: torch.Tensor):
        self.model, self.ids = model, ids
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def forward(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids).loss

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        loss = self.forward()
        loss.backward()
        self.update()
        return loss.item()

    def saved_bytes(self) -> int:
        with SavedBytes(self.model) as watch:
            loss = self.forward()
            kept = watch.total()
        del loss
        return kept


def measure(case: Case, rounds: int, tokens: tuple[int, int]) -> dict:
    ids = torch.randint(0, MODEL["vocab_size"], tokens, generator=torch.Generator().manual_seed(0))
    trained = {name: Trained(make(case), ids) for name, make in PROVIDERS.items()}
    kept = {name: one.saved_bytes() for name, one in trained.items()}
    times: dict[str, list[float]] = {name: [] for name in trained}
    losses: dict[str, float] = {}
    for number in range(rounds + 2):
        for name, one in trained.items():
            start = time.process_time()
            losses[name] = one.step()
            if number >= 2:
                times[name].append(time.process_time() - start)
    del trained
    gc.collect()
    return {
        "case": str(case),
        **asdict(case),
        "ms": {name: round(statistics.median(values) * 1e3, 1) for name, values in times.items()},
        "least_ms": {name: round(min(values) * 1e3, 1) for name, values in times.items()},
        "ratio_to_frozen": {name: ratio(times[name], times["frozen"]) for name in ("peft", "fastpeft")},
        "speedup_over_peft": ratio(times["peft"], times["fastpeft"]),
        "saved_MB": {name: round(size / 2**20, 1) for name, size in kept.items()},
        "loss": {name: round(loss, 4) for name, loss in losses.items()},
    }


def ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(one / two for one, two in zip(above, below, strict=True)), 3)


def table(rows: list[dict]) -> str:
    """Markdown: losses stand beside wins."""
    lines = [
        "| case | frozen ms | PEFT ms | fastpeft ms | PEFT / frozen | fastpeft / frozen | speed-up | frozen keeps | PEFT keeps "
        "| fastpeft keeps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms, ratio, kept = row["ms"], row["ratio_to_frozen"], row["saved_MB"]
        lines.append(
            f"| {row['case']} | {ms['frozen']:.0f} | {ms['peft']:.0f} | {ms['fastpeft']:.0f} | {ratio['peft']:.2f} "
            f"| {ratio['fastpeft']:.2f} | {row['speedup_over_peft']:.2f} | {kept['frozen']:.0f} MB | {kept['peft']:.0f} MB "
            f"| {kept['fastpeft']:.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    names = {str(case): case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="CASE", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the rows, with the machine, to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.only:
        rows.append(measure(names[name], arguments.rounds, (arguments.batch, arguments.length)))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.json:
        record = {"benchmark": "training_step", "threads": arguments.threads, "machine": machine(), "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
