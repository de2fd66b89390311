"""PlanConfig: every option of `fastpeft plan` and of fastpeft.plan."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args

from fastpeft.methods.by_name import near_matches
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.lora import LoraConfig
from fastpeft.training.config import TASK_TYPES, Distributed, Dtype, Quantization

Optimizer = Literal["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"]
Memory = Literal["speed", "balanced", "memory"]

GPUS: dict[float, tuple[str, ...]] = {
    8: ("rtx-3070", "rtx-4060"),
    12: ("rtx-3060", "rtx-4070"),
    16: ("t4", "v100-16", "rtx-4080", "rtx-5080"),
    24: ("rtx-3090", "rtx-4090", "a10", "l4"),
    32: ("v100-32", "rtx-5090"),
    40: ("a100-40",),
    48: ("a6000", "a40", "l40s"),
    80: ("a100", "h100"),
    141: ("h200",),
    192: ("b200", "mi300x"),
}
"""Sizes of GPUs in GiB as they are sold, with the names of some."""


@dataclass(kw_only=True)
class PlanConfig:
    """Peak memory of a training step, what it is made of, and which GPUs it fits; without weights, a GPU, or the memory."""

    model: str
    """A folder with config.json, a config file, a model's name on the Hugging Face hub, or a known shape such as llama-3-8b."""
    seq_len: int = 2048
    """Tokens of a row."""
    batch_size: int = 1
    """Rows of a batch."""
    task: Literal["classification", "causal_lm"] = "causal_lm"
    """What is learned."""
    num_labels: int = 2
    """Classes of a classification head."""
    peft: PeftConfig = field(default_factory=LoraConfig)
    """The adapter: the config of any method."""
    dtype: Dtype = "auto"
    """Data type of the base model's weights; auto: as the config says."""
    bf16: bool = False
    """Compute in bfloat16 (autocast)."""
    quantization: Quantization = "none"
    """Hold the base model's linear weights in 4 bits (nf4, fp4) or 8 (int8)."""
    double_quant: bool = True
    """Hold the scales of 4-bit weights in 8 bits."""
    autocast_adapter_dtype: bool = True
    """Hold the adapter in float32 over a base in half precision."""
    gradient_checkpointing: bool = False
    """Keep less for the backward pass and compute it again."""
    accelerate: bool = True
    """With fastpeft.accelerate."""
    memory: Memory = "balanced"
    """What accelerate keeps for the backward pass: all of it, or elementwise results computed again, or also products."""
    optim: Optimizer = "adamw_torch"
    """Optimizer, by transformers' names."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whose implementations are planned for: the Triton kernels of a GPU, or the library calls of a CPU."""
    processes: int = 1
    """Processes that share the work, one for each GPU; everything is planned for one of them, with batch_size rows of its own."""
    distributed: Distributed = "ddp"
    """What each process holds: the whole base (ddp), or its part of it (fsdp)."""
    shard_adapters: bool = False
    """With fsdp: a part of the adapter and its optimizer states too."""
    gpu: str | None = None
    """A GPU's name, or its GiB: also find the largest batch at this length, and the longest row at batch 1."""
    allowance_gib: float = 1.0
    """GiB that are added for what is not modelled: the CUDA context, libraries' workspaces, fragmentation."""
    every_layer: bool = False
    """Run all layers, also where three runs with a few of them tell the rest."""
    compare_peft: bool = False
    """Also plan the same step with Hugging Face PEFT (LoRA and DoRA over full weights)."""
    json: bool = False
    """Print no table, only the JSON."""

    peft_library: bool = dataclasses.field(default=False, init=False)  # a plan of Hugging Face PEFT, for compare_peft

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "num_labels", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, kind in (("optim", Optimizer), ("quantization", Quantization), ("memory", Memory), ("dtype", Dtype)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {list(get_args(kind))}, got {getattr(self, name)!r}")
        if self.distributed not in get_args(Distributed):
            raise ValueError(f"distributed: expected one of {list(get_args(Distributed))}, got {self.distributed!r}")
        if self.shard_adapters and self.distributed != "fsdp":
            raise ValueError("shard_adapters: expected False without fsdp, got True")
        if self.compare_peft and self.processes > 1:
            raise ValueError(f"compare_peft: expected processes 1, got {self.processes}")
        if self.task not in TASK_TYPES:
            raise ValueError(f"task: expected one of {list(TASK_TYPES)}, got {self.task!r}")
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device: expected 'cuda' or 'cpu', got {self.device!r}")
        if not self.allowance_gib >= 0:
            raise ValueError(f"allowance_gib: expected at least 0, got {self.allowance_gib}")
        if not self.peft.works_with_checkpointing and self.gradient_checkpointing:
            raise ValueError(f"gradient_checkpointing: expected False with {self.peft.peft_type}, got True")
        if self.compare_peft and (self.quantization != "none" or self.peft.peft_type != "LORA"):
            raise ValueError(
                f"compare_peft: expected LoRA or DoRA over full weights, got {self.peft.peft_type} over "
                f"quantization={self.quantization!r}; bitsandbytes' modules do not run without data"
            )
        self.gpu_gib = None if self.gpu is None else gpu_gib(self.gpu)

    def peft_config(self) -> PeftConfig:
        """The adapter's config with the task type filled in."""
        return dataclasses.replace(self.peft, task_type=self.peft.task_type or TASK_TYPES[self.task])


def gpu_gib(gpu: str | float) -> float:
    """GiB of a GPU by its name or its number. Raises ValueError with the names that there are."""
    text = (
        str(gpu)
        .lower()
        .replace(" ", "-")
        .replace("_", "-")
        .removeprefix("nvidia-")
        .removesuffix("gib")
        .removesuffix("gb")
        .removesuffix("-")
    )
    by_name = {name: size for size, names in GPUS.items() for name in names}
    if text in by_name:
        return float(by_name[text])
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError(f"gpu: expected GiB or one of {list(by_name)}, got {gpu!r}{near_matches([text], by_name)}")
    return size
