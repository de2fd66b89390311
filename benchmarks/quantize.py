"""Quantising to 4 bits on the CPU: fastpeft beside bitsandbytes, which gives the same bytes.

    python -m benchmarks.quantize [--size 2048] [--rounds 7]

One process, one thread, interleaved, medians of process CPU time. `equal` compares the packed bytes and, for FP4, the values.
"""

import argparse
import statistics
import time

import torch

from fastpeft.ops.nf4 import quantize_4bit


def measure(w: torch.Tensor, quant_type: str, rounds: int) -> tuple[float, float, bool]:
    """(fastpeft ms, bitsandbytes ms, whether both hold the same weight)."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.functional import quantize_4bit as theirs

    runs = {
        "fastpeft": lambda: quantize_4bit(w, quant_type),
        "bitsandbytes": lambda: theirs(w, quant_type=quant_type, blocksize=64),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - start)
    ours, (packed, state) = runs["fastpeft"](), runs["bitsandbytes"]()
    same_values = torch.equal(ours.dequantize(), dequantize_4bit(packed, state))
    equal = same_values and (quant_type == "fp4" or torch.equal(ours.packed, packed.view(-1)))
    ms = [statistics.median(values) * 1e3 for values in times.values()]
    return ms[0], ms[1], equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the weight")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| weight | fastpeft ms | bitsandbytes ms | ratio | equal |\n|---|---|---|---|---|")
    for quant_type in ("nf4", "fp4"):
        for dtype in (torch.float32, torch.bfloat16):
            w = torch.randn(arguments.size, arguments.size, dtype=dtype)
            ours, theirs, equal = measure(w, quant_type, arguments.rounds)
            print(f"| {quant_type} of {str(dtype)[6:]} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.1f} | {equal} |")


if __name__ == "__main__":
    main()
