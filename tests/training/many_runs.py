"""Several training runs one after another in each process that torchrun starts: starting up takes longer than they do.

python -m torch.distributed.run --nproc-per-node 2 many_runs.py RUNS.json, a list of TrainConfig's fields, LoRA's under "peft".
A run with "goes_on_from" starts from that checkpoint, of an earlier run in the list.
"""

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from fastpeft import LoraConfig
from fastpeft.training import TrainConfig, train


def config(fields: dict) -> TrainConfig:
    return TrainConfig(**fields | {"peft": LoraConfig(**fields["peft"])})


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        checkpoint = run.pop("goes_on_from", None)
        if checkpoint:
            if dist.get_rank() == 0:
                shutil.copytree(checkpoint, Path(run["output_dir"]) / "checkpoints" / Path(checkpoint).name)
            dist.barrier()
        train(config(run))
    dist.destroy_process_group()
