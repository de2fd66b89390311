"""transformers.Trainer for a model with an adapter: adapter-only checkpoints, exact resume, best adapter at the end.

What differs from transformers.Trainer, and why:
- It reads the base model's class and forward signature (labels, loss arguments, columns); the wrapper's forward has none.
- A checkpoint holds the adapter instead of the model, and loading one loads the adapter.
- The loss of a causal LM with a prompt is the mean over its tokens, of which the first follows the prompt.
- Batches grouped by length are drawn from (seed, epoch) alone, and an evaluation leaves the random state as it found it:
  a run that is resumed continues bit for bit.
- It runs over several processes with the results and the files of one (across_processes.py).
- After every optimizer step the adapter's method has its turn (update_and_allocate), and its penalty is added to the loss
  once per step: also where the loss is computed from logits, or accumulated from several batches.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler, SequentialSampler

from fastpeft.model import PeftModel
from fastpeft.training.across_processes import OPTIMIZER, RANDOM, SCHEDULER, STATE_FOLDER, AcrossProcesses
from fastpeft.training.loraplus import create_loraplus_optimizer
from fastpeft.training.run_folder import TrainingInfo
from fastpeft.training.sharded_state import is_state
from fastpeft.training.sharding import whole_adapters
from fastpeft.training.tokenise import IGNORED

_CHECKPOINT_FILES = ("adapter_config.json", "adapter_model.safetensors", SCHEDULER, RANDOM)
STATE_FILE = "trainer_state.json"  # the last file of a checkpoint that is written


class Trainer(AcrossProcesses):
    """transformers.Trainer that trains a fastpeft.PeftModel; any other model passes through unchanged.

    `info`, if given, is written into every checkpoint, so that a checkpoint can be evaluated and used like the result.
    `loraplus`, if given, are keyword arguments of create_loraplus_optimizer, which then makes the optimizer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: Any = None,
        *,
        info: TrainingInfo | None = None,
        loraplus: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        self.info, self.loraplus = info, loraplus
        is_wrapped = isinstance(model, PeftModel)
        with _known_to_have_adapters(model.get_base_model() if is_wrapped else model, is_wrapped) as base:
            super().__init__(base, args, **kwargs)
        if is_wrapped:
            self.model = self.model_wrapped = self.callback_handler.model = model
            self.add_callback(_AfterStep(self))
        self.adopt_sharded(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def train_step(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """One optimizer step for a loop of your own: forward, backward, clip, optimizer, schedule. Moves the batch to the device.

        batch: what the model's forward takes, with labels; or a list of them, whose gradients add up to that of one large batch.
               With args.gradient_accumulation_steps = n a single one is cut into n along its rows
        Returns {"loss", "learning_rate", "grad_norm"}: the loss before the step, the rate it took, the norm before clipping; of
               all processes together, of which each gives rows of its own
        Raises:  ValueError for an empty batch, or where the schedule's length is unknown: neither max_steps nor train_dataset
        """
        batches = self._parts_of(batch)
        if self.lr_scheduler is None:
            self._begin_own_loop()
        model = self.model_wrapped
        events, state = self.callback_handler, (self.args, self.state, self.control)
        items = self._get_num_items_in_batch(batches, self.args.device)
        self.current_gradient_accumulation_steps = len(batches)
        self.accelerator.gradient_state._set_sync_gradients(True)
        events.on_step_begin(*state)
        loss = sum(self.training_step(model, part, items) for part in batches)
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else math.inf
        norm = self.accelerator.clip_grad_norm_(model.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        events.on_pre_optimizer_step(*state)
        self.optimizer.step()
        events.on_optimizer_step(*state)
        rate = self.lr_scheduler.get_last_lr()[0]
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        model.zero_grad()
        self.state.global_step += 1
        events.on_step_end(*state)
        loss = float(self.accelerator.gather(loss).mean())
        return {"loss": loss, "learning_rate": float(rate), "grad_norm": float(norm)}

    def _parts_of(self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The batches of one optimizer step."""
        count = self.args.gradient_accumulation_steps
        if isinstance(batch, Mapping) and count > 1:
            rows = len(next(iter(batch.values()), ()))
            size = math.ceil(rows / count)
            return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, rows, size)] or self._parts_of([])
        batches = [batch] if isinstance(batch, Mapping) else list(batch)
        if not batches or not all(batches):
            raise ValueError(f"train_step: expected a batch, or a list of batches, with tensors in it, got {batch!r}")
        return batches

    def _begin_own_loop(self) -> None:
        """Optimizer and schedule, for as many steps as `train` would take."""
        steps = self.args.max_steps
        if steps <= 0:
            if self.train_dataset is None:
                raise ValueError(
                    "train_step: expected args.max_steps, or a train_dataset, for the length of the schedule"
                )
            batches = len(self.get_train_dataloader())
            steps = math.ceil(self.args.num_train_epochs * math.ceil(batches / self.args.gradient_accumulation_steps))
        self.create_optimizer()
        if self.sharded:
            self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.optimizer = self.accelerator.prepare(self.optimizer)
        else:
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.create_scheduler(steps)
        self.state.max_steps = steps
        self.model_wrapped.zero_grad()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)  # a progress bar begins here

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """transformers' loss, and in training the penalty of the adapter's method, whichever way the loss is computed."""
        if not isinstance(self.model, PeftModel) or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tuner = self.model.base_model
        with tuner.penalty_apart():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        penalty = tuner.penalty()
        if penalty is not None:
            loss = loss + penalty.to(loss.device) / self._losses_that_add_up(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _losses_that_add_up(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """How many batches' losses make that of one step by their sum; 1 where transformers takes the mean itself."""
        summed = self.loss_is_scaled_for_ga
        if summed is None:
            of_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            summed = of_model or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if summed else 1

    def _set_signature_columns_if_needed(self) -> None:
        wrapped = self.model
        if isinstance(wrapped, PeftModel):
            self.model = wrapped.get_base_model()
        try:
            super()._set_signature_columns_if_needed()
        finally:
            self.model = wrapped
        if isinstance(wrapped, PeftModel) and "task_ids" not in self._signature_columns:
            self._signature_columns.append("task_ids")  # of multitask prompts; the base model's forward has none

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Tokens with a loss. After a prompt the first of a row has one as well."""
        shifts = self._loss_shifts_labels
        prompt = self.model.base_model.active_prompt() if isinstance(self.model, PeftModel) else None
        self._loss_shifts_labels = shifts and not (prompt is not None and prompt.lengthens_input)
        try:
            return super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self._loss_shifts_labels = shifts

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.loraplus is None or self.optimizer is not None:
            return super().create_optimizer(model)
        trained = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or "params" in options:
            raise ValueError(
                f"loraplus: expected an optimizer that takes parameter groups, got optim={self.args.optim}"
            )
        self.optimizer = create_loraplus_optimizer(
            trained, kind, loraplus_weight_decay=self.args.weight_decay, **options | self.loraplus
        )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset
        known = "length" in getattr(rows, "column_names", ())
        lengths = rows["length"] if known else [len(row["input_ids"]) for row in rows]
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(list(lengths), group, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else super()._get_eval_sampler(eval_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        with whole_adapters(self.model):
            if self.args.should_save:
                folder = Path(output_dir or self.args.output_dir)
                self.model.save_pretrained(folder)
                if self.info is not None:
                    self.info.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            with whole_adapters(model, change=True):
                model.load_adapter(resume_from_checkpoint, model.active_adapters[0], is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


class _AfterStep(transformers.TrainerCallback):
    """Gives the adapter's method its turn while the step's gradients are still there. Steps count from 1."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:  # float16 overflowed: the gradients are not finite
            self.trainer.model.update_and_allocate(state.global_step + 1)


@contextlib.contextmanager
def _known_to_have_adapters(model: torch.nn.Module, has_adapters: bool) -> Iterator[torch.nn.Module]:
    """Inside, transformers' Trainer takes a quantised model for one with adapters, as it is when adapters are in it."""
    flag = "_hf_peft_config_loaded"
    before = model.__dict__.get(flag)
    if has_adapters:
        model.__dict__[flag] = True
    try:
        yield model
    finally:
        if has_adapters:
            model.__dict__.pop(flag)
            if before is not None:
                model.__dict__[flag] = before


class GroupedByLength(Sampler[int]):
    """Row numbers in an order where each batch has rows of similar length; a function of (seed, epoch) alone.

    The rows are shuffled, cut into blocks of 50 batches, and sorted by length within a block; then the order of the
    batches is shuffled, with the longest first so that running out of memory shows at once.
    """

    BLOCK = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.BLOCK * self.batch_size
        blocks = [sorted(rows[i : i + size], key=lambda row: -self.lengths[row]) for i in range(0, len(rows), size)]
        rows = [row for block in blocks for row in block]
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        tail = [batches.pop()] if len(rows) % self.batch_size else []  # only the last batch may be short
        order = torch.randperm(len(batches), generator=generator).tolist()
        longest = max(order, key=lambda index: self.lengths[batches[index][0]], default=None)
        if longest is not None:
            order.insert(0, order.pop(order.index(longest)))
        return iter([row for batch in [*(batches[index] for index in order), *tail] for row in batch])


def classification_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Mean cross-entropy over all rows of an optimizer step, also when it is accumulated from several batches.

    Shapes:  outputs.logits [B, C], labels [B]; num_items_in_batch: rows in the whole step, or None for this batch alone
    A model's own loss is the mean over its batch, which weights the rows of a short last batch too high, and models such as
    BERT take num_items_in_batch without using it: then accumulation over n batches gives n times the gradient.
    """
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(outputs["logits"].float(), labels, ignore_index=IGNORED, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint-N folder with the largest N that was written to its end, or None.

    A run that is killed while it writes leaves a folder without its last files; that one is passed over.
    """
    folder = Path(folder)
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    newest_first = sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))
    return next((path for path in newest_first if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    if not all((checkpoint / name).is_file() for name in _CHECKPOINT_FILES):
        return False
    if not ((checkpoint / OPTIMIZER).is_file() or is_state(checkpoint / STATE_FOLDER)):
        return False
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return f"checkpoint-{state['global_step']}" == checkpoint.name


def total_steps(rows: int, batch: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run; batch is the rows of one. max_steps counts where it is positive."""
    return max_steps if max_steps > 0 else math.ceil(math.ceil(rows / batch) * epochs)


def warmup_steps(ratio: float, rows: int, batch: int, epochs: float, max_steps: int) -> int:
    """Steps of warm-up: `ratio` of all optimizer steps, rounded up; batch is the rows of one optimizer step."""
    return math.ceil(ratio * total_steps(rows, batch, epochs, max_steps))
