"""The processes of a run, as torchrun starts them: which one this is, and what they do together."""

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset

PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for the others: rank 0 alone writes files, and the slowest disk must not end a run."""


@dataclass(frozen=True)
class Processes:
    """rank of count processes in all, and local_rank on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> "Processes":
        """What torchrun (or any launcher of PyTorch's) says in RANK, WORLD_SIZE and LOCAL_RANK; one process without them."""
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        return cls(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def is_main(self) -> bool:
        """Only this process writes files and shows progress."""
        return self.rank == 0

    def device(self, use_cpu: bool) -> torch.device:
        """The CPU, or this process's GPU."""
        if use_cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda") if self.count == 1 else torch.device("cuda", self.local_rank)

    def join(self, device: torch.device) -> None:
        """Meet the other processes; returns when all are here. gloo on a CPU, NCCL on GPUs.

        Raises:  ValueError for more processes on this machine than GPUs
        """
        if self.count == 1 or dist.is_initialized():
            return
        if device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"processes: expected at most one for each of {torch.cuda.device_count()} GPUs, got number "
                    f"{self.local_rank + 1} on this machine"
                )
            torch.cuda.set_device(device)
        backend = "gloo" if device.type == "cpu" else "cuda:nccl,cpu:gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        self.wait()

    def leave(self) -> None:
        """The end of what join began."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """True in rank 0; the others go on when rank 0 is through."""
        yield self.is_main
        self.wait()

    def own_random_numbers(self, seed: int) -> None:
        """Dropout of this process alone; rank 0 draws what a single process draws."""
        if self.rank:
            torch.manual_seed(seed + self.rank)

    def over_rows(self, compute: Callable[[Dataset], np.ndarray], features: Dataset) -> np.ndarray:
        """compute(features), which gives one row of values per row, with the rows dealt out over the processes.

        Each has as many, as every forward of a sharded model is one of all processes; surplus rows are dropped.
        """
        if self.count == 1:
            return compute(features)
        rows = len(features)
        each = math.ceil(rows / self.count)
        own = [(index * self.count + self.rank) % rows for index in range(each)]
        values: list[np.ndarray | None] = [None] * self.count
        dist.all_gather_object(values, compute(features.select(own, keep_in_memory=True)))
        return np.stack(values, axis=1).reshape(each * self.count, *values[0].shape[1:])[:rows]
