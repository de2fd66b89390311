"""transformers.Trainer over several processes, with the files and the results of one.

- Every process takes its share of each batch (rank_rows.py), so that steps, order and losses are those of one process whose
  batch is as large as all of theirs.
- A model whose base is sharded already (sharding.py) is not wrapped again; whole trained parameters get averaged gradients.
- A checkpoint has the same files whatever the number of processes, and each process's random state beside them; where the base is
  sharded, a folder that all processes write in place of the optimizer's file. Any number of processes goes on from either.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler, Sampler

from fastpeft.training.processes import Processes
from fastpeft.training.rank_rows import RankRows, WithBlankRow
from fastpeft.training.sharded_state import is_state, load_state, save_state
from fastpeft.training.sharding import average_gradients, is_sharded, load_whole_state

OPTIMIZER, SCHEDULER, RANDOM = "optimizer.pt", "scheduler.pt", "rng_state.pth"
STATE_FOLDER = "sharded_state"
"""In a sharded training's checkpoint in the place of OPTIMIZER (sharded_state.py)."""


class AcrossProcesses(transformers.Trainer):
    """What changes when there are several processes; in a single one nothing does."""

    def adopt_sharded(self, model: torch.nn.Module) -> None:
        """Leave a model whose base is sharded as it is, and average the gradients of what is whole. Called after __init__."""
        self.sharded = self.args.world_size > 1 and is_sharded(model)
        self.is_distributed_loading_by_transformers = self.sharded  # transformers' own switch for such a model

    @property
    def processes(self) -> Processes:
        return Processes(self.args.process_index, self.args.world_size, self.args.local_process_index)

    # -- rows -----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        order = None if self.args.world_size <= 1 or self.train_dataset is None else self._order()
        if order is None:  # a single process, or rows without a number
            return super().get_train_dataloader()
        size, processes = self._train_batch_size, self.processes
        rows = RankRows(order, size, processes.rank, processes.count)
        counted = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        loader = DataLoader(
            WithBlankRow(self.train_dataset, blank=counted),
            size,
            sampler=rows,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="Training"),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def _order(self) -> Sampler[int] | None:
        """The order of all rows, as a single process has it."""
        order = self._get_train_sampler(self.train_dataset)
        if type(order) is not RandomSampler:
            return order
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeedableRandomSampler(order.data_source, generator=torch.Generator(), data_seed=seed)

    # -- gradients ------------------------------------------------------------------------------------------------------

    def _sync_replicated_trainable_parameters(self, model: torch.nn.Module) -> None:
        """shard_base has made them equal, and training_step averages their gradients at once."""

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """transformers asks a model's config how it is sharded; here it is over all processes."""
        base = self.model.get_base_model()
        base.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            base.set_requires_gradient_sync(True)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.sharded and self.accelerator.sync_gradients:
            average_gradients(self.model)
        return loss

    # -- checkpoints ----------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            if self.args.should_save:
                shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)  # of a run that was killed while it wrote
            return
        save_state(folder / STATE_FOLDER, self.model, self.optimizer)
        if self.args.should_save:
            (folder / OPTIMIZER).unlink(missing_ok=True)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = Path(checkpoint or "")
        in_parts = checkpoint is not None and is_state(folder / STATE_FOLDER)
        if checkpoint is None or not (in_parts or self.sharded):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if in_parts:
            load_state(folder / STATE_FOLDER, self.model, self.optimizer)
        else:
            load_whole_state(self.optimizer, torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process its own; rank 0's also under the name that a single process reads. trainer_state.json comes after all."""
        super()._save_rng_state(output_dir)
        if self.args.world_size > 1:
            if self.processes.is_main:
                shutil.copyfile(self._random_of(output_dir, 0), os.path.join(output_dir, RANDOM))
            self.processes.wait()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Another number of processes than before: rank 0 goes on with rank 0's, further ones with numbers of their own."""
        super()._load_rng_state(checkpoint)
        rank = self.processes.rank
        if checkpoint is None or self.args.world_size <= 1 or self._random_of(checkpoint, rank).is_file():
            return
        if rank == 0:
            saved = torch.load(Path(checkpoint) / RANDOM, weights_only=False)
            torch.set_rng_state(saved["cpu"])
        else:
            torch.manual_seed(self.args.seed + rank + self.state.global_step)

    @staticmethod
    def _random_of(checkpoint: str, rank: int) -> Path:
        return Path(checkpoint) / f"rng_state_{rank}.pth"
