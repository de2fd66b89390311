"""The 4-bit and 8-bit kernels as they are shipped, for ahead-of-time compilation: see aot_cases.py, which this extends."""

import dataclasses
from collections.abc import Iterator

import torch

from fastpeft.kernels import aot_cases as shipped
from fastpeft.kernels import int8, nf4, nf4_gemm
from fastpeft.kernels.aot_cases import BF16, FP16, FP32, AotCase, case_of
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.nf4 import Packed
from fastpeft.kernels.tiling import Target, padded_rank

_LARGE, _SKINNY = 8192, 16
_THRESHOLD = 6554  # p = 0.1
# name, rows, N and K, rank, double quantisation, dtype of x, dtype of a and b. A K of 576 halves the tile's packed side.
_GEMMS = [
    ("bf16-r16-large", _LARGE, 4096, 16, False, BF16, BF16),
    ("bf16-nested-r16-large", _LARGE, 4096, 16, True, BF16, BF16),
    ("bf16-nested-fp32-adapter-r128-large", _LARGE, 4096, 128, True, BF16, FP32),
    ("bf16-nested-r16-medium", 1024, 4096, 16, True, BF16, BF16),
    ("bf16-nested-r16-k576-large", _LARGE, 576, 16, True, BF16, BF16),
    ("bf16-r16-skinny", _SKINNY, 4096, 16, False, BF16, BF16),
    ("bf16-nested-r16-skinny", _SKINNY, 4096, 16, True, BF16, BF16),
    ("bf16-nested-fp32-adapter-r128-skinny", _SKINNY, 4096, 128, True, BF16, FP32),
    ("bf16-nested-r16-k576-skinny", _SKINNY, 576, 16, True, BF16, BF16),
    ("bf16-nested-r16-32-rows", 32, 4096, 16, True, BF16, BF16),
    ("bf16-nested-r16-64-rows", 64, 4096, 16, True, BF16, BF16),
    ("fp16-r16-large", _LARGE, 4096, 16, False, FP16, FP16),
    ("fp32-r16-large", _LARGE, 4096, 16, False, FP32, FP32),
    ("fp32-r16-skinny", _SKINNY, 4096, 16, False, FP32, FP32),
]
_LIKE_ANOTHER = ("sm_120", "gfx1100")  # only what takes the most registers, and the smallest of the GEMMs

# Sixteen rows, N = K = 4096: seven instructions per weight are issued in 6.0 us on an A100 and 4.0 us on an H100, where the
# bytes of dequantising first take 38 and 23 us (bounds from counts, not timings). vec128: x and w are equally many bytes, so
# if w came in copies of less than 16 bytes, less than 0.55 would.
_SKINNY_LIMITS = {"instructions_per_element": 7.0, "vec128": 0.85}
_IN_FLIGHT = dict.fromkeys(("sm_80", "sm_90", "sm_100"), 36 * 1024)
_TENSOR_BOUND = {"sm_80": 0.95, "sm_90": 0.95}
# A tile of packed weights can be less than 16 bytes per thread: float32's tiles are, and AMD's compiler splits loads.
_FLOAT32_WIDTHS = {"vec128": 0.5}
_AMD = {"vec128": 0.0, "redundancy": 2.0}
_ONE_PASS = {"vec128": 0.25, "redundancy": 2.0}  # no loop: what is counted is all loads, absmax and its tables too


def aot_cases(arch: str) -> list[AotCase]:
    """The kernels of nf4_gemm.py, nf4.py and int8.py for `arch`, each compilation once."""
    target = shipped.target_for(arch)
    cases: dict[tuple, AotCase] = {}
    for name, launch in (*_gemm_launches(target), *_dequantise_launches(target)):
        case = case_of(name, launch)
        if launch.kernel is nf4_gemm._nf4_gemm_kernel:
            case = _with_limits(arch, case)
        elif not name.startswith("nf4_lora"):
            case = dataclasses.replace(case, limits=case.limits | _ONE_PASS)
        compiled = (case.kernel, str((case.signature, case.constexprs, case.divisible)))
        cases.setdefault((*compiled, case.num_warps, case.num_stages), case)
    return list(cases.values())


def _with_limits(arch: str, case: AotCase) -> AotCase:
    tile = case.constexprs
    weights = tile["BLOCK_N"] * tile["BLOCK_K"]
    limits = dict(case.limits)
    half = case.signature["x_ptr"] != "*fp32"
    if arch.startswith("gfx"):
        limits |= _AMD
    elif not half:
        limits |= _FLOAT32_WIDTHS
    elif half and tile["BLOCK_M"] == _SKINNY and "k576" not in case.name:
        limits |= _SKINNY_LIMITS | ({"bytes_in_flight": _IN_FLIGHT[arch]} if arch in _IN_FLIGHT else {})
    elif half and "large" in case.name and "k576" not in case.name and arch in _TENSOR_BOUND:
        limits["pipe_share"] = _TENSOR_BOUND[arch]
    return dataclasses.replace(case, elements=weights, stage_bytes=weights // 2, limits=limits)


def _empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _packed(n: int, k: int, nested: bool, blocksize: int = 64) -> Packed:
    blocks = n * k // blocksize
    packed, codes = _empty(n * k // 2, dtype=torch.uint8), _empty(16)
    if not nested:
        return Packed(packed, _empty(blocks), codes, (n, k), blocksize)
    double = (_empty(256), _empty(-(-blocks // 256)), _empty(1)[0], 256)
    return Packed(packed, _empty(blocks, dtype=torch.uint8), codes, (n, k), blocksize, *double)


def _named(name: str, launches: list[Launch]) -> Iterator[tuple[str, Launch]]:
    launcher, _, suffix = name.partition("-")
    for index, launch in enumerate(launches):
        kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        yield f"{launcher}-{kernel}-{index}-{suffix}" if index else name, launch


def _gemm_launches(target: Target) -> Iterator[tuple[str, Launch]]:
    for suffix, m, k, r, nested, dtype, adapter in _GEMMS:
        if target.arch in _LIKE_ANOTHER and ("nested" not in suffix or "medium" in suffix):
            continue
        n, w, s = k, _packed(k, k, nested), _empty(m, padded_rank(r), dtype=dtype)
        x, bias = _empty(m, k, dtype=dtype), _empty(n, dtype=adapter)
        with record_launches(target) as launches:
            nf4_gemm.nf4_lora_gemm(x, w, s, _empty(n, r, dtype=adapter), bias, precision="ieee")
        yield from _named(f"nf4_lora_gemm-{suffix}", launches)
        for threshold in (0, _THRESHOLD):
            with record_launches(target) as launches:
                a = _empty(r, k, dtype=adapter)
                nf4_gemm.nf4_lora_grad_x(x, w, s, a, seed=1, threshold=threshold, precision="ieee")
            yield from _named(f"nf4_lora_grad_x-{suffix}" + ("-dropout" if threshold else ""), launches)


def _dequantise_launches(target: Target) -> Iterator[tuple[str, Launch]]:
    n = k = 4096
    a, b = _empty(16, k, dtype=BF16), _empty(n, 16, dtype=BF16)
    table = {"scale": 2.0, "dtype": BF16}
    calls = {
        "nf4_dequantize-bf16": lambda: nf4.nf4_dequantize(_packed(n, k, False), BF16),
        "nf4_dequantize-bf16-nested": lambda: nf4.nf4_dequantize(_packed(n, k, True), BF16),
        "nf4_dequantize-fp32-blocksize-4096": lambda: nf4.nf4_dequantize(_packed(n, k, False, 4096), FP32),
        "nf4_quantize-bf16": lambda: nf4.nf4_quantize(
            _empty(n, k, dtype=BF16), _empty(15), _empty(16, dtype=torch.uint8), 64
        ),
        "nf4_merge-bf16-nested-r16": lambda: nf4.nf4_merge(_packed(n, k, True), a, b, **table),
        "int8_dequantize-bf16": lambda: int8.int8_dequantize(_empty(n, k, dtype=torch.int8), _empty(n), BF16),
    }
    for name, call in calls.items():
        with record_launches(target) as launches:
            call()
        yield from _named(name, launches)
