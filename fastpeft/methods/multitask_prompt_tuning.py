"""Multitask prompt tuning: one prompt for all tasks, times a low-rank matrix per task (Wang et al. 2023, arXiv:2303.02861)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from fastpeft.layers.prompt import PROMPT_KEY
from fastpeft.layers.prompt_tuning import MultitaskPromptEmbedding
from fastpeft.methods.prompt_tuning import PromptTuningConfig

FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Options of multitask prompt tuning, by PEFT's names. The model is called with task_ids [B] beside its input.

    Raises:  ValueError for a value outside its range, or a start from source tasks without their file
    """

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    starts: ClassVar[tuple[str, ...]] = (*PromptTuningConfig.starts, *FROM_SOURCE)
    shown_elsewhere: ClassVar[frozenset[str]] = PromptTuningConfig.shown_elsewhere | {
        "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task",
        "num_ranks",
        "num_tasks",
    }

    prompt_tuning_init_state_dict_path: str | None = None
    """The adapter_model.safetensors of the source tasks, to start from with AVERAGE_SOURCE_TASKS (the mean of their
    matrices), EXACT_SOURCE_TASK (those of one) or ONLY_SOURCE_SHARED (the shared prompt alone)."""
    prompt_tuning_init_task: int | None = 0
    """The source task, with EXACT_SOURCE_TASK."""
    num_ranks: int | None = 1
    """Rank of a task's matrix."""
    num_tasks: int | None = 1
    """Number of tasks."""

    def __post_init__(self):
        super().__post_init__()
        where = type(self).__name__
        for name in ("num_ranks", "num_tasks"):
            self._check_count(name)
            if getattr(self, name) is None:
                raise ValueError(f"{where}: expected {name} at least 1, got none")
        if self.prompt_tuning_init in FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ValueError(
                f"{where}: expected prompt_tuning_init_state_dict_path with {self.prompt_tuning_init}, got none"
            )
        if self.prompt_tuning_init in FROM_SOURCE[:2] and self.num_tasks != 1:
            raise ValueError(
                f"{where}: expected num_tasks 1 with {self.prompt_tuning_init}, which gives one task's matrices, got "
                f"{self.num_tasks}"
            )

    def _layer(self) -> MultitaskPromptEmbedding:
        return MultitaskPromptEmbedding(
            self.task_type,
            self.num_virtual_tokens,
            self.num_transformer_submodules,
            self.token_dim,
            tasks=self.num_tasks,
            rank=self.num_ranks,
        )

    @torch.no_grad()
    def _start(self, prompt: MultitaskPromptEmbedding, model: nn.Module) -> None:
        super()._start(prompt, model)
        if self.prompt_tuning_init not in FROM_SOURCE:
            return
        found = self._source_tensors()
        wanted = {PROMPT_KEY: prompt.embedding.weight}
        if self.prompt_tuning_init != "ONLY_SOURCE_SHARED":
            wanted |= prompt.other_tensors()
        for name, tensor in wanted.items():
            if name not in found:
                raise ValueError(
                    f"prompt_tuning_init_state_dict_path: expected {name} in it, got {sorted(found)}; "
                    "is it an adapter of multitask prompt tuning?"
                )
            values = found[name]
            if name != PROMPT_KEY:
                values = self._one_task(values)
            if values.shape != tensor.shape:
                raise ValueError(
                    f"prompt_tuning_init_state_dict_path: expected {name} {tuple(tensor.shape)}, got {tuple(values.shape)}"
                )
            tensor.copy_(values)

    def _one_task(self, values: torch.Tensor) -> torch.Tensor:
        """[tasks, ...] of the source -> [1, ...]."""
        if self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            return values.mean(0, keepdim=True)
        task = self.prompt_tuning_init_task
        if not isinstance(task, int) or not 0 <= task < len(values):
            raise ValueError(
                f"prompt_tuning_init_task: expected one of the source's 0..{len(values) - 1}, got {task!r}"
            )
        return values[task : task + 1]

    def _source_tensors(self) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(self.prompt_tuning_init_state_dict_path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"prompt_tuning_init_state_dict_path: expected a .safetensors file, got {path}; "
                "unpickling runs code from the file"
            )
        if not path.is_file():
            raise FileNotFoundError(f"prompt_tuning_init_state_dict_path: no such file {path}")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"prompt_tuning_init_state_dict_path: {path} is damaged: {error}") from error
