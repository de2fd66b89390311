"""The attention kernels beside a plain causal one in the manner of Triton's tutorial, compiled in one run.

    python -m tests.aot.attention_peers      write benchmarks/results/attention_static.md

Equal work: no bias, one key head per query head, 4096 tokens. The tutorial's backward is one kernel; its row shows the loop
for dk and dv. p: share of the tensor pipe in one turn of the main loop.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from fastpeft.kernels.aot_attention import PRODUCTS, record_attention
from fastpeft.kernels.aot_cases import AotCase, case_of, target_for
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.tiling import TileConfig
from tests.aot.tutorial_attention import tutorial_attention

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/attention_static.md"
HEAD = (
    "| target | kernel | queries x keys | registers | spills/in loop | shared KiB | loop | issue/tensor | p |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)
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


def launches_of(arch: str) -> list[tuple[str, Launch, int]]:
    """(name, launch, multiply-adds of a turn): the tutorial's forward and backward, then fwd, dq and dkdv, by head dim."""
    target, found = target_for(arch), []
    for d in HEAD_DIMS:
        tiles = {"fwd": _FORWARD[arch, d], "bwd": _BACKWARD.get(arch, _BACKWARD["sm_80"])}
        with record_launches(target) as launches:
            tutorial_attention(torch.empty(2, HEADS, TOKENS, d, dtype=torch.bfloat16, device="meta"), tiles)
        named = [
            (f"tutorial-{kernel}-d{d}", n, x) for kernel, n, x in zip(("fwd", "bwd"), (2, 4), launches, strict=True)
        ]
        ours = record_attention(target, d, tokens=TOKENS, kv_heads=HEADS)
        named += [(f"{kernel}-d{d}", PRODUCTS[kernel], launch) for kernel, launch in ours.items()]
        for name, products, launch in named:
            tile = launch.constexprs
            found.append((name, launch, products * tile["BLOCK_M"] * tile["BLOCK_N"] * d))
    return found


def aot_cases(arch: str) -> list[AotCase]:
    """The compilations of `launches_of`."""
    return [dataclasses.replace(case_of(name, launch), tile_fma=fma) for name, launch, fma in launches_of(arch)]


def label(arch: str, name: str, launch: Launch) -> str:
    """The first columns of a row, which need no compiler."""
    tile, config = launch.constexprs, launch.config
    return f"| {arch} | {name} | {tile['BLOCK_M']}x{tile['BLOCK_N']} w{config.num_warps} s{config.num_stages} |"


def table(arch: str) -> list[str]:
    """Markdown rows of one target."""
    from tests.aot.compile import measure_case

    rows = []
    for name, launch, fma in launches_of(arch):
        metrics = measure_case(dataclasses.replace(case_of(name, launch), tile_fma=fma), arch)
        rows.append(
            f"{label(arch, name, launch)} {metrics.registers} | {metrics.spills}/{metrics.loop_spills} | "
            f"{metrics.shared // 1024} | {metrics.loop_instructions} | "
            f"{metrics.cycles['issue'] / metrics.cycles['tensor']:.2f} | {metrics.pipe_share:.2f} |\n"
        )
    return rows


def main() -> int:
    """Write the table."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("expected no TRITON_INTERPRET in the environment; unset it", file=sys.stderr)
        return 2
    import triton

    rows = [row for arch in ARCHS for row in table(arch)]
    RESULTS.write_text(
        f"""# Attention as Triton {triton.__version__} compiles it, beside the attention of Triton's tutorial

Made by `python -m tests.aot.attention_peers`; do not edit. Nothing ran: these are counts of compiled code.

Causal, bfloat16, 4096 tokens, no bias, one key head per query head. The tutorial's backward is one kernel for dq, dk and dv;
its row shows the loop for dk and dv. w: warps, s: stages, loop: instructions of one turn of the main loop, issue/tensor: issue
slots over cycles of the tensor pipe, p: the tensor pipe's share of the busiest pipe's cycles. 32 registers beside thousands of
spills: ptxas gave up.

{HEAD}{"".join(rows)}""",
        encoding="utf-8",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
