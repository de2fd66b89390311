"""The LoRA kernels' GEMM beside plain products in the manner of Triton's tutorials, compiled in one run by one compiler.

    python -m tests.aot.peers       a markdown table for sm_80, sm_90 and sm_100

Static facts, no timings: registers and shared memory per block, blocks per SM, instructions of one K step, tensor cycles
of a K step over those that issuing its instructions takes, and the tensor cores' share of the busiest pipe. M = 8192,
N = K = 4096, bfloat16. Without dropout unless said.
"""

import os
import sys

import torch

from fastpeft.kernels.aot_cases import AotCase, case_of, record_lora, target_for
from fastpeft.kernels.launch import record_launches
from fastpeft.kernels.tiling import TileConfig
from tests.aot import tutorial_matmul

ARCHS = ("sm_80", "sm_90", "sm_100")
RANKS = (16, 64, 128)
M, N, K = 8192, 4096, 4096
THRESHOLD = 6554  # p = 0.1
OURS = {"y": ("lora_epilogue", 0), "dx": ("lora_grad_x", 0), "dx-dropout": ("lora_grad_x", THRESHOLD)}
# Tiles from the tutorials' own lists that compile without a spill and share most; block_r has no meaning here.
TUTORIAL_TILES = {
    "sm_80": TileConfig(128, 256, 64, 1, 8, 3),
    "sm_90": TileConfig(128, 256, 64, 1, 8, 3),
    "sm_100": TileConfig(128, 256, 64, 1, 8, 3),
}


def aot_cases(arch: str) -> list[AotCase]:
    """The tutorials' products first, then y and dx at each rank."""
    target = target_for(arch)
    cases = []
    products = {"tutorial-03": tutorial_matmul.matmul}
    if arch != "sm_80":  # no TMA unit: descriptors become pointers there
        products["tutorial-09"] = tutorial_matmul.matmul_persistent
    for name, product in products.items():
        x, w = (torch.empty(rows, K, dtype=torch.bfloat16, device="meta") for rows in (M, N))
        with record_launches(target) as launches:
            product(x, w, TUTORIAL_TILES[arch])
        cases.append(case_of(name, launches[0]))
    for name, (launcher, threshold) in OURS.items():
        for r in RANKS:
            recorded = record_lora(target, M, N, K, r, torch.bfloat16, torch.bfloat16, threshold)
            cases.append(case_of(f"{name}-r{r}", recorded[launcher][0]))
    return cases


def tensor_per_issue(metrics) -> float:
    """Tensor cycles of one loop turn over the cycles in which its instructions are issued."""
    return metrics.cycles["tensor"] / metrics.cycles["issue"]


def table(arch: str) -> list[str]:
    """Markdown rows of one target."""
    from tests.aot.compile import measure_case

    rows = []
    for case in aot_cases(arch):
        metrics, tile = measure_case(case, arch), case.constexprs
        rows.append(
            f"| {arch} | {case.name} | {tile['BLOCK_M']}x{tile['BLOCK_N']}x{tile['BLOCK_K']} w{case.num_warps} "
            f"s{case.num_stages} | {metrics.registers} | {metrics.spills} | {metrics.shared // 1024} | "
            f"{metrics.blocks_per_sm} | {metrics.loop_instructions} | {tensor_per_issue(metrics):.1f} | "
            f"{metrics.pipe_share:.2f} |"
        )
    return rows


def main() -> int:
    """Print the table."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("expected no TRITON_INTERPRET in the environment; unset it", file=sys.stderr)
        return 2
    print(
        "| target | kernel | tile | registers | spills | shared KiB | blocks/SM | loop | tensor/issue | tensor share |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for arch in ARCHS:
        print("\n".join(table(arch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
