"""One LoRA linear: y = x W^T + s (x A^T) B^T, dx, dA, dB, over a dense or quantised frozen W.

FLOP  2 M N K forward and again for dx, 2 M R (N + K) forward and twice that backward
Bytes of the step, every tensor once: W forward and backward, x and y, dy and dx; A, B and their gradients
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from benchmarks.case import DTYPE_BYTES, SHORT, Absent, Op, Work
from benchmarks.shapes import SHAPES

SCALE = 2.0
WEIGHT_BYTES = {"nf4": 0.516, "int8": 1.0}  # per element; NF4 with double quantisation, 4.127 bits


@dataclass(frozen=True)
class LoRACase:
    """A linear of a model's shape at M rows."""

    model: str
    site: str
    m: int
    r: int = 16
    dtype: str = "bfloat16"
    adapters: str = "float32"
    base: str = "dense"
    dropout: float = 0.0
    dora: bool = False
    backward: bool = True

    @property
    def nk(self) -> tuple[int, int]:
        return SHAPES[self.model].linear(self.site)

    def __str__(self) -> str:
        dtypes = SHORT[self.dtype] + ("" if self.adapters == self.dtype else f"/{SHORT[self.adapters]}")
        extra = [] if self.base == "dense" else [self.base]
        extra += [f"r{self.r}"] if self.r != 16 else []
        extra += [f"dropout{self.dropout:g}"] if self.dropout else []
        extra += ["dora"] if self.dora else []
        extra += [] if self.backward else ["forward"]
        return " ".join([self.model, self.site, f"M{self.m}", dtypes, *extra])

    def flops(self) -> float:
        n, k = self.nk
        base, low = 2.0 * self.m * n * k, 2.0 * self.m * self.r * (n + k)
        return 2 * base + 3 * low if self.backward else base + low

    def bytes(self) -> float:
        n, k = self.nk
        size = DTYPE_BYTES[self.dtype]
        weight = n * k * WEIGHT_BYTES.get(self.base, size)
        adapter = self.r * (n + k) * DTYPE_BYTES[self.adapters]
        rows = self.m * (n + k) * size
        return 2 * (weight + rows) + self.m * k * size + 3 * adapter if self.backward else weight + rows + adapter


ROWS = {
    "MiniLM": (16, 256, 1024, 4096),
    "SmolLM2-135M": (1, 16, 256, 1024, 4096, 16384),
    "Qwen2.5-7B": (1, 16, 256, 1024, 4096, 16384),
    "Llama-3-8B": (1, 16, 256, 1024, 4096, 16384),
    "Llama-3-70B": (1, 16, 256, 1024, 4096, 16384),
}
_VARIED = LoRACase("SmolLM2-135M", "q", 1024)
_WIDE = LoRACase("Llama-3-8B", "q", 256)
_VARIANTS = (
    {"dtype": "bfloat16", "adapters": "bfloat16"},
    {"dtype": "float32", "adapters": "float32"},
    {"r": 8},
    {"r": 64},
    {"r": 128},
    {"base": "nf4"},
    {"base": "int8"},
    {"dropout": 0.1},
    {"dora": True},
    {"base": "nf4", "dropout": 0.1},
    {"base": "nf4", "dora": True},
    {"backward": False},
)
CASES = tuple(
    dict.fromkeys(
        [LoRACase(model, site, m) for model, rows in ROWS.items() for site in ("q", "down") for m in rows]
        + [replace(one, **change) for one in (_VARIED, _WIDE) for change in _VARIANTS]
    )
)
QUICK = (
    LoRACase("SmolLM2-135M", "q", 16),
    LoRACase("SmolLM2-135M", "q", 256),
    LoRACase("SmolLM2-135M", "q", 1024),
    LoRACase("SmolLM2-135M", "down", 1024),
    LoRACase("MiniLM", "q", 1024, dtype="float32"),
    replace(_VARIED, dropout=0.1),
    replace(_VARIED, base="nf4"),
    replace(_VARIED, dora=True),
    LoRACase("Llama-3-8B", "q", 256),
)


def inputs(case: LoRACase, device: torch.device) -> SimpleNamespace:
    """The same tensors for every call: a base module, x, A, B (which is not zero here)."""
    n, k = case.nk
    draw = torch.Generator().manual_seed(0)
    dtype, adapters = getattr(torch, case.dtype), getattr(torch, case.adapters)

    def normal(*shape, std, dtype):
        return (torch.randn(*shape, generator=draw) * std).to(device, dtype)

    base = nn.Linear(k, n, bias=False, device="meta")
    base.weight = nn.Parameter(normal(n, k, std=k**-0.5, dtype=dtype), requires_grad=False)
    if case.base != "dense":
        holder = nn.Sequential(base)
        base = fastpeft.quantize(holder, case.base, compute_dtype=dtype)[0]
    x = normal(case.m, k, std=1.0, dtype=dtype).requires_grad_(case.backward)
    a, b = normal(case.r, k, std=k**-0.5, dtype=adapters), normal(n, case.r, std=0.02, dtype=adapters)
    return SimpleNamespace(case=case, base=base, x=x, a=a, b=b)


def _module(given: SimpleNamespace, module: nn.Module) -> Work:
    """A LoRA module with the given A and B; dense weights and DoRA's magnitudes are those of its own start."""
    with torch.no_grad():
        module.lora_A["default"].weight.data = given.a.clone()
        module.lora_B["default"].weight.data = given.b.clone()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
    leaves = [given.x, module.lora_A["default"].weight, module.lora_B["default"].weight]
    exempt = [*module.parameters(), *module.buffers(), *_storages(given.base)]
    return Work(lambda: module.train()(given.x), leaves, exempt)


def _storages(base: nn.Module) -> list[torch.Tensor]:
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return []
    nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
    return [tensor for tensor in (state.absmax, state.code, *nested) if tensor is not None]


def with_fastpeft(given: SimpleNamespace) -> Work:
    case = given.case
    return _module(
        given,
        fastpeft.LoRALinear(
            given.base, r=case.r, lora_alpha=SCALE * case.r, lora_dropout=case.dropout, use_dora=case.dora
        ),
    )


def with_peft(given: SimpleNamespace) -> Work:
    try:
        import peft
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    except ImportError as error:
        raise Absent(str(error)) from error
    case = given.case
    kind = {"dense": peft.tuners.lora.Linear, "nf4": Linear4bit, "int8": Linear8bitLt}[case.base]
    config = peft.LoraConfig(r=case.r, lora_alpha=SCALE * case.r, lora_dropout=case.dropout, use_dora=case.dora)
    module = kind(given.base, "default", config, r=case.r, lora_alpha=SCALE * case.r)
    return _module(given, module.to(given.x.device))


def with_frozen(given: SimpleNamespace) -> Work:
    """The base alone, dense: what no LoRA linear can beat."""
    weight = dense_weight(given).to(given.x.dtype)
    return Work(lambda: F.linear(given.x, weight), [given.x], [weight])


def dense_weight(given: SimpleNamespace, dtype: torch.dtype | None = None) -> torch.Tensor:
    if given.case.base == "dense":
        return given.base.weight
    module = fastpeft.LoRALinear(given.base, r=given.case.r)
    return module.frozen_weight().dequantize(dtype or given.x.dtype)


def _composed(given: SimpleNamespace) -> Callable[[], torch.Tensor]:
    case, x, dtype = given.case, given.x, given.x.dtype
    weight = dense_weight(given)

    def forward():
        dropped = F.dropout(x, case.dropout) if case.dropout else x
        if case.dora:
            v = weight.to(given.a.dtype) + SCALE * given.b @ given.a
            gain = given.gain / v.norm(dim=1).detach()
            return F.linear(x, (gain[:, None] * v).to(dtype))
        low = F.linear(F.linear(dropped.to(given.a.dtype), given.a), given.b)
        return F.linear(x, weight) + (SCALE * low).to(dtype)

    return forward


def _prepared(given: SimpleNamespace) -> SimpleNamespace:
    given.a.requires_grad_(given.case.backward)
    given.b.requires_grad_(given.case.backward)
    if given.case.dora:
        given.gain = dense_weight(given).to(given.a.dtype).norm(dim=1)
    return given


def with_eager(given: SimpleNamespace) -> Work:
    given = _prepared(given)
    return Work(_composed(given), [given.x, given.a, given.b], [dense_weight(given)])


def with_compile(given: SimpleNamespace) -> Work:
    given = _prepared(given)
    torch.compiler.reset()
    return Work(torch.compile(_composed(given)), [given.x, given.a, given.b], [dense_weight(given)])


def with_unsloth(given: SimpleNamespace) -> Work:
    if given.x.device.type != "cuda":
        raise Absent("Unsloth's kernels need a GPU")
    raise Absent("Unsloth has no LoRA module to call by itself: its patches are measured by the end-to-end suite")


def exact(given: SimpleNamespace, dy: torch.Tensor | None) -> list[torch.Tensor]:
    """y, dx, dA, dB in float64 of the weights as they are stored; the norm of DoRA is detached, as in the paper."""
    x, a, b = (tensor.detach().double().requires_grad_(dy is not None) for tensor in (given.x, given.a, given.b))
    weight = dense_weight(given, torch.float32).double()
    low = SCALE * (x @ a.t()) @ b.t()
    y = x @ weight.t() + low
    if given.case.dora:
        gain = weight.norm(dim=1) / (weight + SCALE * b @ a).norm(dim=1).detach()
        y = gain * y
    return [y.detach()] if dy is None else [y.detach(), *torch.autograd.grad(y, [x, a, b], dy.double())]


PROVIDERS: dict[str, Callable[[Any], Work]] = {
    "frozen": with_frozen,
    "eager": with_eager,
    "torch.compile": with_compile,
    "peft": with_peft,
    "unsloth": with_unsloth,
    "fastpeft": with_fastpeft,
}

OP = Op(
    "lora",
    "LoRA linear",
    CASES,
    QUICK,
    baseline="peft",
    inputs=inputs,
    providers=PROVIDERS,
    exact=exact,
    floor="frozen",
    alike=lambda case: replace(case, dropout=0.0),
)
