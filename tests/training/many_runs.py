"""Several training runs one after another in each process that torchrun starts: starting up takes longer than they do.

python -m torch.distributed.run --nproc-per-node 2 many_runs.py RUNS.json, a list of TrainConfig's fields, LoRA's under "peft"
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from fastpeft import LoraConfig
from fastpeft.training import TrainConfig, train


def config(fields: dict) -> TrainConfig:
    return TrainConfig(**fields | {"peft": LoraConfig(**fields["peft"])})


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        train(config(run))
    dist.destroy_process_group()
