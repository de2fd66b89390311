"""A model with LoRA on all seven linears of a layer, by three libraries, and what is around its training step."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fastpeft
from tests.saved_bytes import SavedBytes

R = 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


def base_model(case: Case, make: Callable[[], nn.Module], *, dense: bool = False) -> nn.Module:
    """The frozen model; quantised as the case says, unless it is to be dense."""
    model = make().to(getattr(torch, case.base)).requires_grad_(False)
    if case.quant and not dense:
        model = fastpeft.quantize(model, case.quant, compute_dtype=getattr(torch, case.base))
    return model


def frozen(case: Case, make: Callable[[], nn.Module]) -> nn.Module:
    model = base_model(case, make, dense=True)
    model.enable_input_require_grads()
    return model.train()


def with_peft(case: Case, make: Callable[[], nn.Module]) -> nn.Module:
    import peft

    return peft.get_peft_model(base_model(case, make), peft.LoraConfig(**_options(case))).train()


def with_fastpeft(case: Case, make: Callable[[], nn.Module]) -> nn.Module:
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
            kept = watch.total() + watch.beside()
        del loss
        return kept


def ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of above / below."""
    return round(statistics.median(one / two for one, two in zip(above, below, strict=True)), 3)
