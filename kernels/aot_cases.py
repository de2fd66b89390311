"""Every kernel as it is shipped, for ahead-of-time compilation: signature, constants, alignment, tile, and granted limits.

The list is a recording of the launchers on meta tensors (launch.py), so it cannot drift from what they launch. Integer
arguments are specialised as Triton's own launcher does it: 1 becomes a constant, multiples of 16 are marked divisible.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastpeft.kernels import lora
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.tiling import Target

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_TYPE_NAMES = {FP32: "fp32", FP16: "fp16", BF16: "bf16", torch.int8: "i8"}
_ALIGNMENT = 16  # bytes for pointers, elements for integers

_PROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 142,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 188,
    "gfx942": 304,
    "gfx1100": 96,
}
_N = _K = 4096
_ROWS = {"large": 8192, "medium": 1024, "small": 512, "skinny": 16}  # each picks another row of the tile table
_EDGES = ("large", "skinny")  # what all but plain bfloat16 is compiled for: their tiles in between are the same
_THRESHOLD = 6554  # p = 0.1
_DTYPES_AND_RANKS = [  # of x and w, of a and b, rank
    (BF16, BF16, 16),
    (BF16, BF16, 64),
    (BF16, BF16, 128),
    (BF16, FP32, 16),
    (BF16, FP32, 64),
    (BF16, FP32, 128),
    (FP16, FP16, 16),
    (FP32, FP32, 16),
]
# Kernels that read one large tensor once: at R = 16 their products are too small for four warps, which then repeat some
# of each other's work (its cost is in the instructions per element of tiling.py). ds and s tiles load 8 bytes per thread.
_MEMORY_BOUND = {"redundancy": 2.0, "vec128": 0.66}


@dataclass(frozen=True)
class AotCase:
    """What `triton.compile` needs to build one kernel. `divisible`: indices of arguments that are multiples of 16.

    tile_fma: multiply-adds of one turn of the main loop of one program, where the kernel is a plain GEMM.
    limits: gates that differ for this case from those that every kernel has to pass.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    tile_fma: int | None
    limits: dict[str, float] = field(default_factory=dict)


def aot_cases(arch: str) -> list[AotCase]:
    """The LoRA kernels for `arch` ("sm_80", "sm_90", "sm_100", "gfx942", ...): 8192 to 16 rows of 4096 x 4096, each once."""
    target = Target(arch, _PROCESSORS[arch])
    cases: dict[tuple, AotCase] = {}
    for name, launch in _lora_launches(target):
        case = case_of(name, launch)
        compiled = (
            case.kernel,
            *map(str, (case.signature, case.constexprs, case.divisible)),
            case.num_warps,
            case.num_stages,
        )
        cases.setdefault(compiled, case)
    return list(cases.values())


def _lora_launches(target: Target) -> Iterator[tuple[str, Launch]]:
    for dtype, adapter_dtype, r in _DTYPES_AND_RANKS:
        for size in _ROWS if dtype == adapter_dtype == BF16 else _EDGES:
            for threshold in (0, _THRESHOLD):
                types = _TYPE_NAMES[dtype] + (
                    "" if dtype == adapter_dtype else f"-{_TYPE_NAMES[adapter_dtype]}-adapter"
                )
                suffix = f"{types}-r{r}-{size}" + ("-dropout" if threshold else "")
                for launcher, launches in record_lora(
                    target, _ROWS[size], _N, _K, r, dtype, adapter_dtype, threshold
                ).items():
                    for launch in launches:
                        kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
                        stage = "" if launch is launches[0] else f"-{kernel}-{launches.index(launch)}"
                        yield f"{launcher}{stage}-{suffix}", launch


def record_lora(target, m, n, k, r, dtype, adapter_dtype, threshold) -> dict[str, list[Launch]]:
    """{launcher: its launches} of forward and backward of one LoRA linear with bias on `target`; nothing runs."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, w, dy, s = empty(m, k), empty(n, k), empty(m, n), empty(m, lora.padded_rank(r))
    a, b, bias = empty(r, k, dtype=adapter_dtype), empty(n, r, dtype=adapter_dtype), empty(n, dtype=adapter_dtype)
    dropout = {"seed": 1, "threshold": threshold, "precision": "ieee"}
    calls = {
        "lora_down": lambda: lora.lora_down(x, a, scale=2.0, **dropout),
        "lora_epilogue": lambda: lora.lora_epilogue(x, w, s, b, bias, precision="ieee"),
        "lora_grad_s_b": lambda: lora.lora_grad_s_b(dy, b, s, scale=2.0, threshold=threshold, precision="ieee"),
        "lora_grad_x": lambda: lora.lora_grad_x(dy, w, s, a, **dropout),
        "lora_grad_a": lambda: lora.lora_grad_a(x, s, a, **dropout),
        "lora_keep": lambda: lora.lora_keep(1, m, k, threshold, "meta"),
    }
    recorded = {}
    for name, call in calls.items():
        with record_launches(target) as launches:
            call()
        recorded[name] = launches
    return recorded


def case_of(name: str, launch: Launch) -> AotCase:
    """The compilation that `launch` causes."""
    signature, constexprs, divisible = {}, {}, []
    for index, (param, arg) in enumerate(zip(launch.kernel.params, launch.args, strict=False)):
        aligned = False
        if isinstance(arg, torch.Tensor):
            signature[param.name] = "*" + _TYPE_NAMES[arg.dtype]
            aligned = arg.storage_offset() * arg.element_size() % _ALIGNMENT == 0
        elif arg is None or (isinstance(arg, int) and arg == 1 and not param.do_not_specialize):
            signature[param.name], constexprs[param.name] = "constexpr", arg
        elif isinstance(arg, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = param.annotation_type or ("i32" if abs(arg) < 2**31 else "i64")
            aligned = arg % _ALIGNMENT == 0 and not param.do_not_specialize
        if aligned:
            divisible.append(index)
    for constant, value in launch.constexprs.items():
        signature[constant], constexprs[constant] = "constexpr", value
    tile = launch.constexprs
    is_gemm = all(side in tile for side in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    one_chunk = tile.get("PADDED_R") == tile.get("BLOCK_R")  # else the loop over chunks is a second loop with products
    return AotCase(
        name=name,
        kernel=launch.kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(divisible),
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
        tile_fma=tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"] if is_gemm and one_chunk else None,
        limits={} if is_gemm else _MEMORY_BOUND,
    )
