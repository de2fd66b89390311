#!/usr/bin/env bash
# On a machine with a GPU (sized for ten minutes; it has not run on one yet): the kernel tests, tuning, every op and the whole training step beside the peers.
# Writes benchmarks/results/GPU.json and GPU_step.json, and a report beside them, GPU being the device's name.
#     pip install -e ".[dev]" && benchmarks/gpu.sh
# Liger-Kernel, flash-attn, xformers and Unsloth are measured where they are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$(python - <<'PYTHON'
import re, torch
if not torch.cuda.is_available():
    raise SystemExit("error: no GPU that PyTorch can use; without one: python -m benchmarks run, python -m benchmarks static")
print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_"))
PYTHON
)
results=benchmarks/results
echo "== kernels, on $name" >&2
python -m pytest -q -n 8 tests/kernels
echo "== tuning" >&2
fastpeft tune --shapes 4096x4096 14336x4096 4096x14336 --rows 16 1024 4096
echo "== ops" >&2
python -m benchmarks run --seconds 0.5 --json "$results/$name.json"
python -m benchmarks report "$results/$name.json"
echo "== training step" >&2
python -m benchmarks.accelerate --device cuda --rounds 10 --json "$results/${name}_step.json"
python -m benchmarks.accelerate --device cuda --rounds 5 --batch 1 --length 4096 --only lora_bf16 qlora_nf4_bf16 dora_bf16
