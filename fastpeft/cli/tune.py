"""fastpeft tune."""

import sys
from dataclasses import dataclass, field
from typing import Literal, TextIO

DTYPES = Literal["float32", "float16", "bfloat16"]


@dataclass(kw_only=True)
class TuneConfig:
    """Measure, on this machine, which algorithm is fastest for the linears of a model; later runs use what was found.

    Measurements are kept per device, versions and shapes. What is there already is not measured again, so an interrupted
    run goes on where it stopped.
    """

    model: str | None = None
    """A model's folder or name, for the shapes of its linears. Its weights are not read."""
    shapes: list[str] = field(default_factory=list)
    """Shapes of weights instead, OUTxIN, such as 4096x4096."""
    rows: list[int] = field(default_factory=lambda: [16, 128, 1024, 4096])
    """Rows of the input: batch size times tokens. Others take the nearest, up to four times away."""
    r: int = 16
    """Rank of the adapter."""
    dtype: DTYPES = "bfloat16"
    """Dtype of the base and its input."""
    adapter_dtype: DTYPES | None = None
    """Dtype of the adapter; the base's by default, float32 over a half-precision base on a CPU."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """How the base is stored."""
    dropout: bool = False
    """Measure with dropout on the adapter's input."""
    device: str | None = None
    """Where to measure; the GPU if there is one."""
    again: bool = False
    """Measure also what was measured before."""

    def __post_init__(self) -> None:
        if (self.model is None) == (not self.shapes):
            raise ValueError(f"tune: expected --model or --shapes, got {'both' if self.model else 'neither'}")
        self.sizes = [_size(text) for text in self.shapes]
        if not self.rows or min(self.rows) < 1:
            raise ValueError(f"tune: expected --rows of at least 1, got {self.rows}")
        if self.r < 1:
            raise ValueError(f"tune: expected --r of at least 1, got {self.r}")


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"tune: expected shapes as OUTxIN, such as 4096x4096, got {text!r}")
    return int(parts[0]), int(parts[1])


CONFIG = TuneConfig


def run(config: TuneConfig, results: TextIO) -> dict:
    """Measure and print one line per problem; return where the table is and what wins."""
    import torch

    from fastpeft.ops import tune
    from fastpeft.ops.tune_table import table_path

    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes = config.sizes or _shapes_of(config.model)
    base = "dense" if config.quantization == "none" else config.quantization
    dtype = getattr(torch, config.dtype)
    adapter_dtype = getattr(torch, config.adapter_dtype) if config.adapter_dtype else None
    if device.type == "cpu" and adapter_dtype is None and dtype != torch.float32:
        adapter_dtype = torch.float32
    wanted = tune.problems(
        shapes,
        config.rows,
        device,
        r=config.r,
        dtype=dtype,
        base=base,
        dropout=config.dropout,
        adapter_dtype=None if adapter_dtype == dtype else adapter_dtype,
    )
    print(f"{len(wanted)} problems on {device}; table {table_path(device)}", file=sys.stderr)
    measured = 0

    def tell(problem, seconds) -> None:
        nonlocal measured
        measured += 1
        times = "  ".join(f"{name} {value * 1e6:.0f} us" for name, value in sorted(seconds.items(), key=lambda p: p[1]))
        results.write(f"{problem.key} M={problem.m}: {times}\n")

    table = tune.tune(wanted, device, again=config.again, tell=tell)
    best = {
        f"{problem.key}-m{problem.m}": min(seconds, key=seconds.get)
        for problem in wanted
        for seconds in [table[problem.key][str(problem.m)]]
    }
    return {"table": str(table_path(device)), "problems": len(wanted), "measured": measured, "best": best}


def _shapes_of(model: str) -> list[tuple[int, int]]:
    from fastpeft.integrations.transformers import load_model
    from fastpeft.ops.tune import linear_shapes

    return linear_shapes(load_model(model, labels=[], on_meta=True))
