"""The attention kernels, for ahead-of-time compilation: a recording of the launchers on meta tensors, as in aot_cases.py.

Causal, bfloat16, 16 query heads on 4 key heads, 4099 tokens, so that rows are masked and heads shared: the most general code of
the plain case. Head dims 64 and 128, with and without a bias and its gradient; fewer of head dim 256, of float32, of every term
at once, and of the targets whose code is another's.
"""

import dataclasses
import math

import torch

from fastpeft.kernels.aot_cases import BF16, FP32, AotCase, case_of, target_for
from fastpeft.kernels.attention_bwd import attention_bwd
from fastpeft.kernels.attention_call import AttentionCall, empty_aligned
from fastpeft.kernels.attention_fwd import attention_fwd
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.tiling import Target

_BATCH, _HEADS, _KV_HEADS, _TOKENS, _EVEN_TOKENS = 2, 16, 4, 4099, 4096
_THRESHOLD = 6554  # p = 0.1
PRODUCTS = {"fwd": 2, "dq": 3, "dkdv": 4}  # of a tile of scores
_KERNELS = tuple(PRODUCTS)
# Least share of the tensor pipe in one turn of the main loop, which spills nothing: fwd, dq, dkdv by head dim and bias. What is
# low waits for exp2 (sm_100 and sm_90 fwd at D = 64), for instructions of the bias, for AMD's vector pipe or, on sm_80, for
# shared memory.
_SHARES = {
    "sm_80": {
        (64, False): (0.95, 0.95, 0.95),
        (128, False): (0.88, 0.85, 0.75),
        (64, True): (0.95, 0.8, 0.63),
        (128, True): (0.73, 0.75, 0.59),
    },
    "sm_90": {
        (64, False): (0.95, 0.98, 0.98),
        (128, False): (0.98, 0.98, 0.98),
        (64, True): (0.75, 0.95, 0.95),
        (128, True): (0.98, 0.98, 0.98),
    },
    "sm_100": {
        (64, False): (0.48, 0.73, 0.9),
        (128, False): (0.97, 0.98, 0.98),
        (64, True): (0.37, 0.5, 0.5),
        (128, True): (0.69, 0.78, 0.94),
    },
    "gfx942": {
        (64, False): (0.61, 0.93, 0.72),
        (128, False): (0.98, 0.98, 0.92),
        (64, True): (0.54, 0.82, 0.66),
        (128, True): (0.95, 0.98, 0.8),
    },
}
# Issue slots per tensor cycle on sm_90, at most: what is left of them hides latencies.
_ISSUE = {64: (0.95, 0.56, 0.62), 128: (0.55, 0.4, 0.37)}
_FMA_PER_SLOT = 512  # multiply-adds of sm_90's tensor cores in one issue slot of each of the four schedulers
# Spill instructions that are granted, all before and after the main loop unless said.
_SPILLS = {
    ("sm_80", "dq", 128, True): 14,
    ("sm_90", "dkdv", 128, True): 7,
    ("sm_100", "fwd", 128, True): 4,
    ("gfx942", "dkdv", 64, True): 2,
}
_WIDE = {  # D = 256: redundancy is of warps that share rows
    ("sm_90", "dkdv"): {"spills": 8, "redundancy": 1.5},
}
_EVEN = {"sm_80": {"spills": 6}, "sm_90": {}, "gfx942": {"vec128": 0.75}}  # gfx942: lse and delta 4 bytes at a time
_FLOAT32 = {"dq": {"spills": 249, "loop_spills": 102}}
_LIKE_ANOTHER = {  # (kernel, head dim): limits
    "sm_120": {("dkdv", 64): {}, ("dkdv", 128): {"spills": 9}},
    "gfx1100": {
        ("dq", 128): {"redundancy": 5 / 3, "spills": 4},
        ("dkdv", 64): {"vec128": 0.33},
        ("dkdv", 128): {"redundancy": 1.5, "spills": 181, "loop_spills": 20, "vec128": 0.5},
    },
}


def aot_cases(arch: str) -> list[AotCase]:
    """The attention kernels for `arch`, each compilation once; of targets that are like another's only some."""
    target = target_for(arch)
    if arch in _LIKE_ANOTHER:
        return [
            _case(kernel, d, record_attention(target, d), limits) for (kernel, d), limits in _LIKE_ANOTHER[arch].items()
        ]
    cases = []
    for (d, bias), shares in _SHARES[arch].items():
        launches = record_attention(target, d, with_bias=bias)
        for kernel, share in zip(_KERNELS, shares, strict=True):
            limits = {"pipe_share": share, "spills": _SPILLS.get((arch, kernel, d, bias), 0)}
            case = _case(kernel, d, launches, limits, "-bias" if bias else "")
            if arch == "sm_90" and not bias:
                issue = _ISSUE[d][_KERNELS.index(kernel)]
                limits["loop_instructions"] = int(issue * case.tile_fma / (_FMA_PER_SLOT * case.num_warps))
            cases.append(case)
    if arch in _EVEN:
        launches = record_attention(target, 128, tokens=_EVEN_TOKENS, kv_heads=_HEADS)
        cases.append(_case("dkdv", 128, launches, _EVEN[arch], "-even-own-heads"))
    if arch in ("sm_90", "gfx942"):
        launches = record_attention(target, 256)
        cases += [_case(kernel, 256, launches, _WIDE.get((arch, kernel), {})) for kernel in _KERNELS]
    if arch == "sm_80":
        launches = record_attention(target, 128, dtype=FP32)
        for kernel in _KERNELS:
            case = _case(kernel, 128, launches, _FLOAT32.get(kernel, {}))
            cases.append(dataclasses.replace(case, name=case.name.replace("bf16", "fp32"), tile_fma=None))
    if arch == "sm_90":
        cases += _cases_with_everything(target)
    return cases


def _cases_with_everything(target: Target) -> list[AotCase]:
    """Every term at once, packed, and a head dim that is not a power of two: that it compiles, and without atomics."""
    limits = {"spills": math.inf, "loop_spills": math.inf, "redundancy": math.inf, "vec128": 0.0}
    launches = record_attention(target, 80, everything=True)
    named = [(f"attention_{kernel}-bf16-d80-everything", launch) for kernel, launch in launches.items()]
    return [dataclasses.replace(case_of(name, launch), limits=limits) for name, launch in named]


def _case(kernel: str, d: int, launches: dict[str, Launch], limits: dict[str, float], suffix: str = "") -> AotCase:
    launch = launches[kernel]
    tile = launch.constexprs
    fma = PRODUCTS[kernel] * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_D"]
    case = case_of(f"attention_{kernel}-bf16-d{d}{suffix}", launch)
    return dataclasses.replace(case, tile_fma=fma, limits=limits)


def record_attention(
    target: Target,
    d: int,
    *,
    with_bias: bool = False,
    everything: bool = False,
    with_rope: bool = False,
    tokens: int = _TOKENS,
    kv_heads: int = _KV_HEADS,
    dtype: torch.dtype = BF16,
) -> dict[str, Launch]:
    """{"fwd", "dq", "dkdv" and, with a broadcast bias, "dbias": its launch} of one attention on `target`; nothing runs."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch = 1 if everything else _BATCH
    q, k = empty(batch, tokens, _HEADS, d), empty(batch, tokens, kv_heads, d)
    bias_shape, terms = None, {}
    if with_bias:
        bias_shape = (batch, _HEADS, tokens, tokens)
        terms = {"bias": empty_aligned((*bias_shape[:3], -(-tokens // 16) * 16), dtype, q.device)}
    if everything:
        bias_shape = (1, 1, tokens, tokens)
        terms = {
            "bias": empty_aligned((1, 1, tokens, -(-tokens // 16) * 16), dtype, q.device).expand(1, _HEADS, -1, -1),
            "distances": empty(_HEADS, 257, dtype=FP32),
            "slopes": empty(batch, _HEADS, dtype=FP32),
            "sinks": empty(_HEADS),
            "padding": empty(batch, tokens, dtype=torch.int8),
            "valid": empty(batch, 2, dtype=torch.int32),
            "rows": empty(3, tokens, dtype=torch.int32),
            "keys": empty(2, tokens, dtype=torch.int32),
            "softcap": 30.0,
            "left": 1024,
            "threshold": _THRESHOLD,
            "seed": 1,
        }
    if with_rope:
        terms |= {"cos": empty(1, tokens, d // 2), "sin": empty(1, tokens, d // 2)}
    call = AttentionCall(scale=d**-0.5, right=0, **terms)
    with record_launches(target) as launches:
        o, lse = attention_fwd(q, k, k, call, precision="ieee")
        attention_bwd(
            q,
            q,
            k,
            k,
            o,
            lse,
            call,
            with_keys=True,
            bias_shape=bias_shape,
            with_distances=everything,
            with_sinks=everything,
            precision="ieee",
        )
    named = {launch.kernel.__name__.removeprefix("_attention_").removesuffix("_kernel"): launch for launch in launches}
    return {name: launch for name, launch in named.items() if name in ("fwd", "dq", "dkdv", "dbias")}
