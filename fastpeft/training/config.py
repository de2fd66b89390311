"""TrainConfig: every option of a training run. Command-line flags and the saved JSON come from it."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fastpeft.methods.config import PeftConfig
from fastpeft.methods.lora import LoraConfig
from fastpeft.training.record import TASKS
from fastpeft.training.text_format import TextFormat
from fastpeft.training.tracking import check_tracker_names

DEFAULT_MAX_LENGTH = 512
Quantization = Literal["none", "nf4", "fp4", "int8"]
Memory = Literal["speed", "balanced", "memory"]
Distributed = Literal["ddp", "fsdp"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TASK_TYPES = {"classification": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}
METRICS = {
    "classification": ("accuracy", "loss", "f1", "f1_macro", "precision", "recall", "roc_auc"),
    "causal_lm": ("loss", "perplexity", "token_accuracy", "exact_match"),
}
"""Metrics that may choose the best checkpoint; the first is the default."""


@dataclass(kw_only=True)
class DataConfig:
    """Where the rows are and how they are read."""

    data: str
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, or a folder with a saved dataset or with train,
    validation and test files."""
    validation_data: str | None = None
    """File with validation rows; default: the folder's, else part of the training rows."""
    test_data: str | None = None
    """File with test rows, for the final metrics; default: the folder's, else the validation rows are used."""
    validation_fraction: float = 0.1
    """Part of the training rows held out if there are no validation rows; 0 for none."""
    text_column: str | None = None
    """Column with the text; default: text, sentence, review, ..."""
    text_pair_column: str | None = None
    """Column with a second text, for classifying pairs."""
    label_column: str | None = None
    """Column with the class: a name, or a whole number 0..C-1; default: label, labels, sentiment, ..."""
    prompt_column: str | None = None
    """Column with the prompt; default: prompt, instruction, question, ..."""
    response_column: str | None = None
    """Column with the response; the loss is on it alone. Default: response, completion, output, ..."""
    messages_column: str | None = None
    """Column with chat messages [{role, content}, ...]; default: messages, conversation, ..."""
    max_train_rows: int | None = None
    """Use only the first so many training rows."""
    max_eval_rows: int | None = None
    """Use only the first so many validation and test rows."""
    max_length: int | None = None
    """Tokens a row is cut to; default: 512, or what the model has."""
    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    """How prompt and response become text: the tokenizer's chat template, or prompt + separator, response + end of text."""
    separator: str = "\n"
    """Text between prompt and response in the plain format."""
    train_on_prompt: bool = False
    """Put the loss on the prompt too."""

    def __post_init__(self) -> None:
        _check(
            0.0 <= self.validation_fraction < 1.0, "validation_fraction", "0 <= fraction < 1", self.validation_fraction
        )
        for name in ("max_train_rows", "max_eval_rows", "max_length"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "at least 1, or none", value)

    def wanted_columns(self) -> dict[str, str | None]:
        """Column overrides by role, for `data.choose_columns`."""
        roles = ("text", "text_pair", "label", "prompt", "response", "messages")
        return {role: getattr(self, f"{role}_column") for role in roles}

    def text_format(self, longest: int | None, taken: int = 0) -> TextFormat:
        """How text becomes tokens for a model with `longest` positions (None: no bound), of which `taken` are not for text."""
        room = None if longest is None else longest - taken
        if room is not None and (room < 1 or (self.max_length or 1) > room):
            less = f" less the prompt's {taken}" if taken else ""
            raise ValueError(
                f"max_length: expected at most the model's {longest} positions{less}, got {self.max_length}"
            )
        default = min(DEFAULT_MAX_LENGTH, room or DEFAULT_MAX_LENGTH)
        return TextFormat(self.max_length or default, self.prompt_format, self.separator, self.train_on_prompt)


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """How a base model is held.

    quantization and double_quant: as in TrainConfig; dtype: of what is not quantised, and of a 4-bit weight's products;
    bf16: products in bfloat16
    """

    quantization: Quantization = "none"
    double_quant: bool = True
    dtype: Dtype = "auto"
    bf16: bool = False

    @classmethod
    def as_trained(cls, training: dict[str, Any], dtype: Dtype = "auto") -> "BaseOptions":
        """Those of a run, by its options as they are saved beside the adapter; `dtype` instead of its own if it is not auto."""
        if training.get("quantization", "none") == "none":
            return cls(dtype=dtype)
        known = {name: training[name] for name in ("quantization", "double_quant", "dtype", "bf16") if name in training}
        return cls(**known) if dtype == "auto" else cls(**known | {"dtype": dtype, "bf16": False})


@dataclass(kw_only=True)
class TrainConfig(DataConfig):
    """Fine-tune a pretrained model with an adapter, and evaluate it before and after."""

    model: str
    """The base model: a folder of a transformers model, or its name on the Hugging Face hub."""
    output_dir: str
    """Folder for the adapter, checkpoints/, run.json and report.html."""
    task: Literal["classification", "causal_lm"] | None = None
    """What is learned; default: classification if there is a label column, else causal_lm."""
    labels: tuple[str, ...] = ()
    """Names of the classes in index order; default: found in the training rows."""
    peft: PeftConfig = field(default_factory=LoraConfig)
    """The adapter: the config of any method."""

    num_train_epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps; if positive, instead of num_train_epochs."""
    learning_rate: float | None = None
    """Peak learning rate; default: what suits the method and the model's size (fastpeft.training.guidance)."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of LoRA's B over A's (LoRA+); default: one rate for both. 16 is a common choice, with a smaller rate."""
    loraplus_lr_embedding: float = 1e-6
    """Learning rate of LoRA on embeddings with loraplus_lr_ratio."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.06
    """Part of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for never."""
    optim: str = "adamw_torch"
    """Optimizer, by transformers' names."""
    per_device_train_batch_size: int = 8
    """Rows of a training batch of one process."""
    per_device_eval_batch_size: int = 32
    """Rows of an evaluation batch."""
    gradient_accumulation_steps: int = 1
    """Batches of an optimizer step in each process; the gradient is that of one large batch."""
    group_by_length: bool = True
    """Put rows of similar length into a batch, so that little is padded."""
    bf16: bool = False
    """Compute in bfloat16 (autocast); the adapter stays float32."""
    dtype: Dtype = "auto"
    """Data type of the base model's weights, and of the products with quantised ones; auto: as saved."""
    quantization: Quantization = "none"
    """Hold the base model's linear weights in 4 bits (nf4, fp4) or 8 (int8), quantised while they are read."""
    double_quant: bool = True
    """Hold the scales of 4-bit weights in 8 bits: 4.13 bits a weight instead of 4.5."""
    gradient_checkpointing: bool = False
    """Keep less for the backward pass and compute it again."""
    accelerate: bool = True
    """Train with the model's parts replaced by faster ones of the same results (fastpeft.accelerate)."""
    memory: Memory = "balanced"
    """What accelerate keeps for the backward pass: all of it, or elementwise results computed again, or also products, with
    gradient checkpointing."""
    offload: bool = False
    """On a GPU, hold what is kept for the backward pass in CPU memory."""
    cpu_fast_matmul: bool = True
    """On a CPU, send float32 products to oneDNN where they stay float32 there."""
    use_cpu: bool = False
    """Stay on the CPU even if there is a GPU."""
    nproc: int = 1
    """Processes that `fastpeft train` starts on this machine, one for each GPU; leave it 1 under torchrun."""
    distributed: Distributed = "ddp"
    """With several processes: ddp holds the whole base in each, fsdp (FSDP2) a part of it, gathered layer by layer."""
    shard_adapters: bool = False
    """With fsdp, shard the adapter and its optimizer states too; else they are whole in every process."""

    eval_strategy: Literal["epoch", "steps", "no"] = "epoch"
    """When to evaluate on the validation rows and save a checkpoint."""
    eval_steps: int = 500
    """Steps between evaluations and checkpoints for eval_strategy steps."""
    save_total_limit: int = 2
    """Checkpoints that are kept."""
    load_best_model_at_end: bool = True
    """Keep the adapter of the best evaluation, not of the last step."""
    metric_for_best_model: str | None = None
    """Metric of the validation rows that decides; default: accuracy for classification, loss for a causal LM."""
    logging_steps: int = 10
    """Steps between logged losses."""
    seed: int = 0
    """Seed of the adapter's initial values, the order of rows, dropout and the validation split."""

    baseline: bool = True
    """Evaluate before training too."""
    examples: int = 8
    """Held-out rows to show with their predictions before and after."""
    max_new_tokens: int = 64
    """Tokens of a shown response."""
    report: bool = True
    """Write report.html."""
    title: str | None = None
    """Heading of the report."""
    save_predictions: bool = False
    """Write predictions.npz: class logits, or loss and correct tokens, of every held-out row."""
    report_to: list[str] | None = None
    """Where losses and metrics are logged beside run.json: tensorboard, wandb, mlflow, or none; default: tensorboard if it is
    installed."""
    overwrite: bool = False
    """Replace a run that is in output_dir; its adapter stays until the new one is complete."""
    resume: bool = False
    """Continue the run in output_dir from its last complete checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.task is None or self.task in TASKS, "task", f"one of {TASKS}", self.task)
        choices = get_args(Quantization)
        _check(self.quantization in choices, "quantization", f"one of {choices}", self.quantization)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("eval_steps", "save_total_limit", "logging_steps", "max_new_tokens", "nproc"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("weight_decay", "max_grad_norm", "examples", "seed"):
            _check(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("learning_rate", "loraplus_lr_ratio", "loraplus_lr_embedding"):
            value = getattr(self, name)
            _check(value is None or value > 0, name, "more than 0, or none", value)
        _check(0.0 <= self.warmup_ratio <= 1.0, "warmup_ratio", "0 <= ratio <= 1", self.warmup_ratio)
        _check(
            self.num_train_epochs > 0 or self.max_steps > 0, "num_train_epochs", "more than 0", self.num_train_epochs
        )
        _check(
            self.peft.works_with_checkpointing or not self.gradient_checkpointing,
            "gradient_checkpointing",
            f"False with {self.peft.peft_type}, whose trained keys stand in the cache that it switches off",
            self.gradient_checkpointing,
        )
        _check(self.memory in get_args(Memory), "memory", f"one of {get_args(Memory)}", self.memory)
        choices = get_args(Distributed)
        _check(self.distributed in choices, "distributed", f"one of {choices}", self.distributed)
        _check(self.distributed == "fsdp" or not self.shard_adapters, "shard_adapters", "False without fsdp", True)
        _check(self.accelerate or not self.offload, "offload", "False without accelerate", self.offload)
        if self.report_to is not None:
            check_tracker_names(self.report_to)
        _check(not (self.overwrite and self.resume), "overwrite, resume", "at most one of them", "both")

    def best_metric(self, task: str) -> str:
        """The metric that chooses the best checkpoint."""
        name = (self.metric_for_best_model or METRICS[task][0]).removeprefix("eval_")
        _check(name in METRICS[task], "metric_for_best_model", f"one of {METRICS[task]} for {task}", name)
        return name

    def peft_config(self, task: str) -> PeftConfig:
        """The adapter's config with the task type filled in: it decides which head is trained and saved."""
        return dataclasses.replace(self.peft, task_type=self.peft.task_type or TASK_TYPES[task])

    def loraplus(self) -> dict[str, float] | None:
        """LoRA+'s rates, or None where A and B learn alike."""
        if self.loraplus_lr_ratio is None:
            return None
        names = ("loraplus_lr_ratio", "loraplus_lr_embedding")
        return {name: getattr(self, name) for name in names}

    def text_format(self, longest: int | None, taken: int = 0) -> TextFormat:
        """How text becomes tokens for a model with `longest` positions, of which a prompt takes the first."""
        return super().text_format(longest, taken + getattr(self.peft, "num_virtual_tokens", 0))

    def base_options(self) -> BaseOptions:
        """How the base model is held."""
        return BaseOptions(
            quantization=self.quantization, double_quant=self.double_quant, dtype=self.dtype, bf16=self.bf16
        )

    def to_dict(self) -> dict[str, Any]:
        """Every option as plain values; the adapter's under "peft"."""
        values = dataclasses.asdict(self) | {"peft": self.peft.to_dict()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _check(holds: bool, name: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
