"""Every kernel as it is shipped, for ahead-of-time compilation: signature, constants, alignment, tile, and granted limits.

The list is a recording of the launchers on meta tensors (launch.py), so it cannot drift from what they launch. Integer
arguments are specialised as Triton's own launcher does it: 1 becomes a constant, multiples of 16 are marked divisible.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpeft.kernels import lora
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.tiling import MIN_PADDED_RANK, MIN_TILE_ROWS, Target

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_TYPE_NAMES = {FP32: "fp32", FP16: "fp16", BF16: "bf16", torch.int8: "i8", torch.uint8: "u8"}
_TYPE_NAMES |= {torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
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
_THRESHOLD = 6554  # p = 0.1
_ALL = ("lora_down", "lora_epilogue", "lora_grad_s_b", "lora_grad_x", "lora_grad_a", "lora_keep")
_WITH_GAIN = (*_ALL, "lora_epilogue_gain")
_WITH_SKINNY_TILES = ("lora_down", "lora_epilogue", "lora_grad_x")
# dtype of x and w, dtype of a and b, rank, rows, launchers. float16's code is bfloat16's; float32 adapters take the most
# registers and shared memory at the largest rank; tiles of "medium" and "small" differ in the GEMM only.
_SHIPPED = [
    (BF16, BF16, 16, "large", _WITH_GAIN),
    (BF16, BF16, 64, "large", _ALL),
    (BF16, BF16, 128, "large", _WITH_GAIN),
    (BF16, BF16, 128, "medium", ("lora_grad_x",)),
    (BF16, BF16, 128, "small", ("lora_grad_x",)),
    (BF16, BF16, 128, "skinny", _WITH_SKINNY_TILES),
    (BF16, FP32, 128, "large", _WITH_GAIN),
    (FP16, FP16, 16, "skinny", _WITH_SKINNY_TILES),
    (FP32, FP32, 16, "large", _ALL),
    (FP32, FP32, 16, "skinny", _WITH_SKINNY_TILES),
]
LIKE_ANOTHER = ("sm_120", "gfx1100")  # their code is sm_80's and gfx942's: only what takes most registers
# Kernels that read one large tensor once: at R = 16 their products are too small for four warps, which then repeat some
# of each other's work (its cost is in the instructions per element of tiling.py). ds and s tiles load 8 bytes per thread.
_MEMORY_BOUND = {"redundancy": 2.0}
# Lane-instructions per element of the tensor that is read once, at R = 16: below 19.5 (A100) and 17.7 (H100) a kernel with
# dropout waits for DRAM and not for its own instructions. gfx1100 has bandwidth for 32.
_INSTRUCTIONS_PER_ELEMENT = {
    "_lora_down_kernel": (2.0, 15.0),  # without and with dropout
    "_lora_grad_s_b_kernel": (4.5, 4.5),
    "_lora_grad_a_kernel": (3.0, 15.0),
}
_BYTES_IN_FLIGHT = 32 * 1024  # per SM, of the tensor that is read once: about twice bandwidth times latency of an H100
_TMA_LOOP_INSTRUCTIONS = 95  # of one K step, on sm_90


@dataclass(frozen=True)
class AotCase:
    """What `triton.compile` needs to build one kernel. `divisible`: indices of arguments that are multiples of 16.

    tile_fma: multiply-adds of one turn of the main loop of one program, where the kernel is a plain GEMM.
    elements, stage_bytes: for a kernel that streams one large tensor, the elements of it that one turn of one program's
    main loop consumes, and the bytes of it that one stage of the pipeline holds.
    limits: gates that differ for this case from those that every kernel has to pass.
    options: of the compiler, beside warps and stages.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    tile_fma: int | None
    elements: int | None = None
    stage_bytes: int | None = None
    limits: dict[str, float] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)


def target_for(arch: str) -> Target:
    """The target of one of the GPUs that are compiled for."""
    return Target(arch, _PROCESSORS[arch])


def aot_cases(arch: str) -> list[AotCase]:
    """The LoRA kernels for `arch` ("sm_80", "sm_90", "sm_100", "gfx942", ...): 8192 to 16 rows of 4096 x 4096, each once."""
    target = target_for(arch)
    cases: dict[tuple, AotCase] = {}
    for name, launch in _lora_launches(target):
        case = case_of(name, launch)
        case = dataclasses.replace(case, limits=case.limits | _limits(arch, case))
        compiled = (
            case.kernel,
            *map(str, (case.signature, case.constexprs, case.divisible)),
            case.num_warps,
            case.num_stages,
        )
        cases.setdefault(compiled, case)
    return list(cases.values())


def _limits(arch: str, case: AotCase) -> dict[str, float]:
    """What is asked of a kernel beyond the gates of all: see the constants above."""
    constants, kernel = case.constexprs, case.kernel.__name__
    if arch == "sm_90" and kernel == "_lora_gemm_tma_kernel":
        return {"loop_instructions": _TMA_LOOP_INSTRUCTIONS}
    if kernel not in _INSTRUCTIONS_PER_ELEMENT or arch == "gfx1100":
        return {}
    streams_halves = next(iter(case.signature.values())) != "*fp32"
    is_tall = constants["BLOCK_M"] > MIN_TILE_ROWS
    if streams_halves and is_tall and constants["PADDED_R"] == MIN_PADDED_RANK:
        per_element = _INSTRUCTIONS_PER_ELEMENT[kernel][constants.get("DROPOUT", False)]
        return {"instructions_per_element": per_element, "bytes_in_flight": _BYTES_IN_FLIGHT}
    return {}


def _lora_launches(target: Target) -> Iterator[tuple[str, Launch]]:
    for dtype, adapter_dtype, r, size, launchers in _SHIPPED:
        if target.arch in LIKE_ANOTHER and (r == 64 or dtype == FP16):
            continue
        types = _TYPE_NAMES[dtype] + ("" if dtype == adapter_dtype else f"-{_TYPE_NAMES[adapter_dtype]}-adapter")
        for threshold in (0, _THRESHOLD):
            suffix = f"{types}-r{r}-{size}" + ("-dropout" if threshold else "")
            recorded = record_lora(target, _ROWS[size], _N, _K, r, dtype, adapter_dtype, threshold)
            for launcher in launchers:
                for index, launch in enumerate(recorded[launcher]):
                    kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
                    yield f"{launcher}-{suffix}" if not index else f"{launcher}-{kernel}-{index}-{suffix}", launch


def record_lora(target, m, n, k, r, dtype, adapter_dtype, threshold) -> dict[str, list[Launch]]:
    """{launcher: its launches} of forward and backward of one LoRA linear with bias on `target`; nothing runs."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, w, dy, s = empty(m, k), empty(n, k), empty(m, n), empty(m, lora.padded_rank(r))
    a, b, bias = empty(r, k, dtype=adapter_dtype), empty(n, r, dtype=adapter_dtype), empty(n, dtype=adapter_dtype)
    gain = empty(n, dtype=FP32)
    dropout = {"seed": 1, "threshold": threshold, "precision": "ieee"}
    calls = {
        "lora_down": lambda: lora.lora_down(x, a, scale=2.0, **dropout),
        "lora_epilogue": lambda: lora.lora_epilogue(x, w, s, b, bias, precision="ieee"),
        "lora_epilogue_gain": lambda: lora.lora_epilogue(x, w, s, b, bias, gain=gain, precision="ieee"),
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


def _streamed_elements(tile: dict[str, Any]) -> int | None:
    """Elements of the tensor that a one-pass kernel reads in one loop turn: its rows by its columns or its depth."""
    sides = [tile[side] for side in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if side in tile]
    return sides[0] * sides[1] if len(sides) == 2 and "BLOCK_R" in tile else None


def case_of(name: str, launch: Launch) -> AotCase:
    """The compilation that `launch` causes."""
    signature, constexprs, divisible = {}, {}, []
    for index, (param, arg) in enumerate(zip(launch.kernel.params, launch.args, strict=False)):
        aligned = False
        if isinstance(arg, TensorDescriptor):
            block = ",".join(map(str, arg.block_shape))
            signature[param.name] = f"tensordesc<{_TYPE_NAMES[arg.base.dtype]}[{block}]>"
        elif isinstance(arg, torch.Tensor):
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
    streamed = None if is_gemm else _streamed_elements(tile)
    return AotCase(
        name=name,
        kernel=launch.kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=tuple(divisible),
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
        tile_fma=tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"] if is_gemm else None,
        elements=streamed,
        stage_bytes=streamed * launch.args[0].element_size() if streamed else None,
        limits={} if is_gemm else _MEMORY_BOUND,
        options=launch.config.options,
    )
