"""The attention kernels, for ahead-of-time compilation: a recording of the launchers on meta tensors, as in aot_cases.py.

Causal, bfloat16, 16 query heads on 4 key heads, 4099 tokens, so that rows are masked and heads shared: the most general code of
the plain case. Head dims 64 and 128, with and without a bias and its gradient.
"""

import dataclasses
import math

import torch

from fastpeft.kernels.aot_cases import BF16, FP32, LIKE_ANOTHER, AotCase, case_of, target_for
from fastpeft.kernels.attention_bwd import attention_bwd
from fastpeft.kernels.attention_call import AttentionCall, empty_aligned
from fastpeft.kernels.attention_fwd import attention_fwd
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.tiling import Target

_BATCH, _HEADS, _KV_HEADS, _TOKENS, _EVEN_TOKENS = 2, 16, 4, 4099, 4096
_THRESHOLD = 6554  # p = 0.1
_GFX942_DKDV_VEC128 = 0.66  # lse and delta come in loads of 4 bytes per lane
PRODUCTS = {"fwd": 2, "dq": 3, "dkdv": 4}  # of a tile of scores
# (least share of the tensor pipe, spill instructions at most, of these in the main loop) by kernel, head dim and bias. sm_90 at
# D = 64 waits for exp2 (fwd, 0.97) and, with a bias, for its own instructions. Where sm_80 spills in a loop at D = 128, 8 warps
# or narrower tiles do not, and have shares of 0.47 (dq with a bias) and 0.63 (dkdv).
_GOALS: dict[str, dict[tuple[str, int, bool], tuple[float, ...]]] = {
    "sm_80": {
        ("fwd", 64, False): (0.95, 16),
        ("fwd", 128, False): (0.85, 19),
        ("dq", 64, False): (0.95, 16),
        ("dq", 128, False): (0.84, 0),
        ("dkdv", 64, False): (0.95, 0),
        ("dkdv", 128, False): (0.75, 16, 2),
        ("fwd", 64, True): (0.9, 26),
        ("fwd", 128, True): (0.7, 0),
        ("dq", 64, True): (0.8, 16),
        ("dq", 128, True): (0.7, 142, 41),
        ("dkdv", 64, True): (0.6, 0),
        ("dkdv", 128, True): (0.55, 16),
    },
    "sm_90": {
        ("fwd", 64, False): (0.95, 0),
        ("fwd", 128, False): (0.98, 2),
        ("dq", 64, False): (0.98, 0),
        ("dq", 128, False): (0.98, 0),
        ("dkdv", 64, False): (0.98, 0),
        ("dkdv", 128, False): (0.98, 0),
        ("fwd", 64, True): (0.75, 0),
        ("fwd", 128, True): (0.95, 40),
        ("dq", 64, True): (0.95, 0),
        ("dq", 128, True): (0.95, 0),
        ("dkdv", 64, True): (0.9, 8),
        ("dkdv", 128, True): (0.95, 0),
    },
    "gfx942": {
        ("fwd", 64, False): (0.6, 0),
        ("fwd", 128, False): (0.95, 0),
        ("dq", 64, False): (0.9, 0),
        ("dq", 128, False): (0.95, 4),
        ("dkdv", 64, False): (0.72, 20),
        ("dkdv", 128, False): (0.9, 0),
        ("fwd", 64, True): (0.54, 0),
        ("dq", 64, True): (0.83, 0),
        ("dkdv", 64, True): (0.6, 10),
        ("dkdv", 128, True): (0.77, 0),
    },
}


def aot_cases(arch: str) -> list[AotCase]:
    """The attention kernels for `arch`, each compilation once; none where their code is another target's."""
    if arch in LIKE_ANOTHER:
        return []
    target, cases = target_for(arch), []
    for d in (64, 128):
        for bias in (False, True):
            for kernel, launch in record_attention(target, d, with_bias=bias).items():
                case = _case(f"attention_{kernel}-bf16-d{d}" + ("-bias" if bias else ""), kernel, launch)
                goal = _GOALS.get(arch, {}).get((kernel, d, bias), ())
                limits = dict(zip(("pipe_share", "spills", "loop_spills"), goal, strict=False))
                if arch == "gfx942" and kernel == "dkdv":
                    limits["vec128"] = _GFX942_DKDV_VEC128
                cases.append(dataclasses.replace(case, limits=limits))
    launch = record_attention(target, 128, tokens=_EVEN_TOKENS, kv_heads=_HEADS)["dkdv"]
    even = _case("attention_dkdv-bf16-d128-even-own-heads", "dkdv", launch)
    granted = {"sm_80": {"spills": 8, "loop_spills": 2}, "gfx942": {"vec128": _GFX942_DKDV_VEC128}}
    cases.append(dataclasses.replace(even, limits=granted.get(arch, {})))
    if arch == "sm_90":
        cases += _cases_with_everything(target)
    return cases


def _cases_with_everything(target: Target) -> list[AotCase]:
    """Every term at once, packed, and a head dim that is not a power of two: that it compiles, and without atomics."""
    limits = {"spills": math.inf, "loop_spills": math.inf, "redundancy": math.inf, "vec128": 0.0}
    launches = record_attention(target, 80, everything=True)
    named = [(f"attention_{kernel}-bf16-d80-everything", launch) for kernel, launch in launches.items()]
    return [dataclasses.replace(case_of(name, launch), limits=limits) for name, launch in named]


def _case(name: str, kernel: str, launch: Launch) -> AotCase:
    tile = launch.constexprs
    fma = PRODUCTS[kernel] * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_D"]
    return dataclasses.replace(case_of(name, launch), tile_fma=fma, limits={})


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
