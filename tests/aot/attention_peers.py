"""The attention kernels beside a plain causal one in the manner of Triton's tutorial, compiled in one run.

    python -m tests.aot.attention_peers [arch ...]      a Markdown table

Equal work: no bias, one key head per query head, 4096 tokens. The tutorial's backward is one kernel; its row shows the loop
for dk and dv. p: share of the tensor pipe in one turn of the main loop.
"""

import dataclasses
import os
import sys

import torch

from fastpeft.kernels.aot_attention import PRODUCTS, record_attention
from fastpeft.kernels.aot_cases import AotCase, case_of, target_for
from fastpeft.kernels.launch import record_launches
from fastpeft.kernels.tiling import TileConfig
from tests.aot.tutorial_attention import tutorial_attention

ARCHS = ("sm_80", "sm_90", "gfx942")
HEAD_DIMS = (64, 128)
TOKENS, HEADS = 4096, 16
# Of the tutorial: forward from its list of configurations, backward its only one; AMD's has no more than 2 stages of room.
_FORWARD = {
    ("sm_80", 64): TileConfig(128, 64, 1, 1, 4, 3),
    ("sm_80", 128): TileConfig(128, 64, 1, 1, 8, 3),
    ("sm_90", 64): TileConfig(128, 64, 1, 1, 4, 3),
    ("sm_90", 128): TileConfig(128, 128, 1, 1, 8, 2),
    ("gfx942", 64): TileConfig(128, 64, 1, 1, 4, 1),
    ("gfx942", 128): TileConfig(128, 32, 1, 1, 4, 1),
}
_BACKWARD = {"sm_80": TileConfig(32, 128, 1, 1, 4, 5), "gfx942": TileConfig(32, 128, 1, 1, 4, 1)}


def aot_cases(arch: str) -> list[AotCase]:
    """The tutorial's forward and backward, then fwd, dq and dkdv, at each head dim."""
    target, cases = target_for(arch), []
    for d in HEAD_DIMS:
        tiles = {"fwd": _FORWARD[arch, d], "bwd": _BACKWARD.get(arch, _BACKWARD["sm_80"])}
        with record_launches(target) as launches:
            tutorial_attention(torch.empty(2, HEADS, TOKENS, d, dtype=torch.bfloat16, device="meta"), tiles)
        for kernel, products, launch in zip(("fwd", "bwd"), (2, 4), launches, strict=True):
            tile = launch.constexprs
            fma = products * tile["BLOCK_M"] * tile["BLOCK_N"] * d
            cases.append(dataclasses.replace(case_of(f"tutorial-{kernel}-d{d}", launch), tile_fma=fma))
        for kernel, launch in record_attention(target, d, tokens=TOKENS, kv_heads=HEADS).items():
            tile = launch.constexprs
            fma = PRODUCTS[kernel] * tile["BLOCK_M"] * tile["BLOCK_N"] * d
            cases.append(dataclasses.replace(case_of(f"{kernel}-d{d}", launch), tile_fma=fma))
    return cases


def table(arch: str) -> list[str]:
    """Markdown rows of one target."""
    from tests.aot.compile import measure_case

    rows = []
    for case in aot_cases(arch):
        metrics, tile = measure_case(case, arch), case.constexprs
        rows.append(
            f"| {arch} | {case.name} | {tile['BLOCK_M']}x{tile['BLOCK_N']} w{case.num_warps} s{case.num_stages} | "
            f"{metrics.registers} | {metrics.spills}/{metrics.loop_spills} | {metrics.shared // 1024} | "
            f"{metrics.loop_instructions} | {metrics.cycles['issue'] / metrics.cycles['tensor']:.2f} | "
            f"{metrics.pipe_share:.2f} |"
        )
    return rows


def main() -> int:
    """Print the table."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("expected no TRITON_INTERPRET in the environment; unset it", file=sys.stderr)
        return 2
    print("| target | kernel | queries x keys | registers | spills/in loop | shared KiB | loop | issue/tensor | p |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arch in sys.argv[1:] or ARCHS:
        print("\n".join(table(arch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
