"""fastpeft.plan: peak memory of a training step, what it is made of, and what fits a GPU, for a model that is not here."""

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastpeft.methods.by_name import check_fields, named_method
from fastpeft.methods.config import PeftConfig
from fastpeft.training.plan_config import GPUS, PlanConfig
from fastpeft.training.plan_sharded import ALL_KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fastpeft.training.estimate import Estimate, Estimator

GIB = 2**30
ROWS_LIMIT, TOKENS_LIMIT, TOKENS_STEP = 4096, 2**20, 64


@dataclass(frozen=True)
class Fit:
    """Whether a GPU of gib GiB holds the step; margin_bytes: what is left over, or with a minus sign what is missing"""

    gib: float
    names: tuple[str, ...]
    fits: bool
    margin_bytes: int


@dataclass(frozen=True)
class Largest:
    """The most that a GPU holds: rows of seq_len tokens, 0 for not even one, and tokens of a single row; and the peaks there.

    tokens_limited: the model has no more positions than that; rows_limited: more rows were not tried
    """

    gib: float
    batch_size: int
    batch_bytes: int
    seq_len: int
    seq_bytes: int
    rows_limited: bool
    tokens_limited: bool


@dataclass(frozen=True)
class Plan:
    """A planned training step.

    parts: bytes by kind at the peak, which add up to peak_bytes; where: phase and operator of the peak; needed_bytes: with the
    allowance for what is not modelled; layers_run: how many layers were run of `layers`, more by a checked line
    """

    options: PlanConfig
    peak_bytes: int
    parts: dict[str, int]
    where: tuple[str, str]
    allowance_bytes: int
    trainable: int
    total: int
    layers: int | None
    layers_run: tuple[int, ...]
    fits: tuple[Fit, ...]
    largest: Largest | None = None
    peft: "Plan | None" = None
    accelerated: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes + self.allowance_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        options = self.options
        largest_found = None if self.largest is None else dataclasses.asdict(self.largest)
        return {
            "model": options.model,
            "method": options.peft.peft_type,
            "batch_size": options.batch_size,
            "seq_len": options.seq_len,
            "quantization": options.quantization,
            "gradient_checkpointing": options.gradient_checkpointing,
            "accelerate": options.accelerate,
            "device": options.device,
            "processes": options.processes,
            "distributed": options.distributed,
            "shard_adapters": options.shard_adapters,
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "peak_bytes": self.peak_bytes,
            "parts": self.parts,
            "at": list(self.where),
            "allowance_bytes": self.allowance_bytes,
            "needed_bytes": self.needed_bytes,
            "layers": self.layers,
            "layers_run": list(self.layers_run),
            "fits": {f"{fit.gib:g}": {"fits": fit.fits, "margin_bytes": fit.margin_bytes} for fit in self.fits},
            "largest": largest_found,
            "peft": None if self.peft is None else {"peak_bytes": self.peft.peak_bytes, "parts": self.peft.parts},
            "seconds": round(self.seconds, 1),
        }

    def table(self) -> str:
        """The plan as text."""
        from fastpeft.training.plan_table import table

        return table(self)


def plan(model: "str | os.PathLike | PreTrainedConfig", method: str | PeftConfig = "lora", **options: Any) -> Plan:
    """Plan a training step of `model`, which is not loaded: only its config is read.

        print(plan("llama-3-70b", "qlora", r=16, seq_len=4096, gradient_checkpointing=True, gpu="h100").table())

    model:   a folder with config.json, a config file, a hub name, a name in model_shapes.SHAPES, or a transformers config
    method:  a name as get_peft_config takes it ("qlora" quantises the base, too), or a config
    options: fields of PlanConfig, or of the method's config
    Raises:  ValueError for a name that is neither, and for a model, GPU or option that is not known
    """
    return make_plan(plan_config(model, method, options), None if isinstance(model, (str, os.PathLike)) else model)


def plan_config(model: Any, method: str | PeftConfig, options: Mapping[str, Any]) -> PlanConfig:
    """The PlanConfig of a call."""
    kind, peft, training = type(method), {}, {}
    if not isinstance(method, PeftConfig):
        named = named_method(method)
        kind, peft, training = named.config_class, dict(named.options), dict(named.training)
    of_plan = {item.name for item in dataclasses.fields(PlanConfig) if item.init} - {"model", "peft", "json"}
    of_method = {item.name for item in dataclasses.fields(kind)}
    check_fields("plan", options, of_plan | of_method)
    peft |= {name: value for name, value in options.items() if name in of_method and name not in of_plan}
    training = {name: value for name, value in training.items() if name in of_plan}
    training |= {name: value for name, value in options.items() if name in of_plan}
    config = dataclasses.replace(method, **peft) if isinstance(method, PeftConfig) else kind(**peft)
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else model.model_type
    return PlanConfig(model=name, peft=config, **training)


def make_plan(options: PlanConfig, config: "PreTrainedConfig | None" = None) -> Plan:
    """The plan of `options`; config: the model's, where it is in memory already."""
    from fastpeft.integrations.transformers import longest_input
    from fastpeft.training.estimate import Estimator
    from fastpeft.training.model_shapes import config_of

    start = time.perf_counter()
    config = config_of(options.model) if config is None else config
    positions = longest_input(config)
    if positions is not None and options.seq_len > positions:
        raise ValueError(f"seq_len: expected at most the model's {positions} positions, got {options.seq_len}")
    estimator = Estimator(options, config)
    found = _plan_of(options, estimator.at(options.batch_size, options.seq_len))
    if options.gpu_gib is not None:
        found = dataclasses.replace(found, largest=_largest(estimator, options, positions))
    if options.compare_peft:
        twin = dataclasses.replace(options, compare_peft=False, accelerate=False)
        twin.peft_library = True
        theirs = Estimator(twin, config).at(options.batch_size, options.seq_len)
        found = dataclasses.replace(found, peft=_plan_of(twin, theirs))
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


def _plan_of(options: PlanConfig, estimate: "Estimate") -> Plan:
    peak, allowance = estimate.peak, _allowance(options)
    fits = []
    for size, names in GPUS.items():
        margin = round(size * GIB) - peak.nbytes - allowance
        fits.append(Fit(size, names, margin >= 0, margin))
    return Plan(
        options=options,
        peak_bytes=peak.nbytes,
        parts={kind: peak.parts[kind] for kind in ALL_KINDS if peak.parts.get(kind)},
        where=peak.where,
        allowance_bytes=allowance,
        trainable=estimate.step.trainable,
        total=estimate.step.total,
        layers=estimate.layers,
        layers_run=estimate.layers_run,
        fits=tuple(fits),
        accelerated=estimate.step.accelerated,
    )


def _allowance(options: PlanConfig) -> int:
    return round(options.allowance_gib * GIB)


def _largest(estimator: "Estimator", options: PlanConfig, positions: int | None) -> Largest:
    room = round(options.gpu_gib * GIB) - _allowance(options)
    longest = min(positions or TOKENS_LIMIT, TOKENS_LIMIT)
    steps = max(longest // TOKENS_STEP, 1)

    def length(step: int) -> int:
        return min(step * TOKENS_STEP, longest)

    def rows_over(rows: int) -> int:
        return estimator.at(rows, options.seq_len).peak.nbytes - room

    def tokens_over(step: int) -> int:
        return estimator.at(1, length(step)).peak.nbytes - room

    from fastpeft.training.estimate import largest

    rows = largest(rows_over, 1, ROWS_LIMIT)
    step = largest(tokens_over, 1, steps)
    return Largest(
        gib=options.gpu_gib,
        batch_size=rows,
        batch_bytes=room + rows_over(rows) if rows else 0,
        seq_len=length(step) if step else 0,
        seq_bytes=room + tokens_over(step) if step else 0,
        rows_limited=rows == ROWS_LIMIT,
        tokens_limited=step == steps,
    )
