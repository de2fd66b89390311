"""Bytes that kernels move, counted access by access in Triton's interpreter, over the compulsory ones.

compulsory  every 32-byte sector of a launch once: what DRAM must move with an ideal cache
programs    every sector once per program: what the L2 cache hands out
asked       bytes of all active lanes, over those of the sectors that they touch: coalescing

    python -m benchmarks.traffic        prints the table; needs a process of its own, which `table` starts
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.tables import markdown, size

ROOT = Path(__file__).resolve().parents[1]
HEAD = ("op", "kernel", "compulsory", "handed out by L2 / compulsory", "asked / sectors")


def table() -> str:
    """The table, from a process in which kernels are interpreted."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.traffic"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"traffic: the interpreter failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout.strip()


def steps() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, a step by the Triton implementation at a small aligned size) of every op."""
    import torch

    import fastpeft
    from fastpeft import apply_rope, attention, linear_cross_entropy, lora_linear
    from fastpeft.ops.dora import dora_linear
    from fastpeft.ops.nf4 import quantize_4bit

    def normal(*shape):
        return torch.randn(*shape).bfloat16().requires_grad_()

    x, w, a, b = normal(128, 128), normal(128, 128).detach(), normal(16, 128), normal(128, 16)
    yield "LoRA linear", lambda: lora_linear(x, w, a, b, impl="triton").sum().backward()
    nf4 = quantize_4bit(w)
    yield "QLoRA linear", lambda: lora_linear(x, nf4, a, b, impl="triton").sum().backward()
    magnitude = normal(128)
    yield "DoRA linear", lambda: dora_linear(x, w, a, b, magnitude, impl="triton").sum().backward()
    q, k, v = normal(1, 256, 4, 64), normal(1, 256, 2, 64), normal(1, 256, 2, 64)
    yield "attention, causal", lambda: attention(q, k, v, causal=True, impl="triton").sum().backward()
    cos, sin = torch.randn(256, 32), torch.randn(256, 32)
    yield "rope", lambda: apply_rope(q, k, cos, sin, impl="triton")[0].sum().backward()
    weight, bias = normal(128), normal(128)
    yield "RMSNorm", lambda: fastpeft.rms_norm(x, weight, eps=1e-5, impl="triton").sum().backward()
    yield "LayerNorm", lambda: fastpeft.layer_norm(x, weight, bias, eps=1e-5, impl="triton").sum().backward()
    gate, up = normal(128, 256), normal(128, 256)
    yield "SwiGLU", lambda: fastpeft.swiglu(gate, up, impl="triton").sum().backward()
    yield "GEGLU", lambda: fastpeft.geglu(gate, up, impl="triton").sum().backward()
    head, labels = normal(512, 128).detach(), torch.randint(0, 512, (128,))
    yield "linear + cross-entropy", lambda: linear_cross_entropy(x, head, labels, impl="triton").backward()


def main() -> None:
    """Count and print."""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # read when triton is imported
    from tests import interpreter
    from tests.traffic import SECTOR_BYTES, Probe

    interpreter.install()
    rows = []
    for name, step in steps():
        with Probe() as probe:
            step()
        for launch in probe.launches:
            unique = sum(launch.unique_bytes(key) for key in launch.asked)
            program = sum(launch.program_bytes(key) for key in launch.asked)
            asked, sectors = sum(launch.asked.values()), SECTOR_BYTES * sum(launch.sectors.values())
            kernel = launch.kernel.strip("_").removesuffix("_kernel")
            rows.append([name, kernel, size(unique), f"{program / unique:.2f}", f"{asked / sectors:.2f}"])
    print(markdown(HEAD, rows))


if __name__ == "__main__":
    main()
