"""Prompt tuning: the prompt [P, H] itself is trained (Lester et al. 2021, arXiv:2104.08691)."""

import torch
from torch import nn

from fastpeft.layers.prompt_inputs import InputPrompt


class PromptEmbedding(InputPrompt):
    """inputs_embeds = [prompt; embed(input_ids)].

    Shapes:  prompt [P, H]: P = num_virtual_tokens times the transformers of the model, H the width of its embeddings
    Dtypes:  prompt float32, cast to the embeddings' dtype where they meet
    Grads:   prompt
    Source:  Lester et al. 2021, arXiv:2104.08691
    """

    def __init__(self, task_type: str, num_virtual_tokens: int, submodules: int, width: int):
        super().__init__(task_type, num_virtual_tokens)
        self.embedding = nn.Embedding(num_virtual_tokens * submodules, width)

    def prompt_embeddings(self) -> torch.Tensor:
        return self.embedding.weight


class MultitaskPromptEmbedding(PromptEmbedding):
    """prompt_k = prompt * (cols_k rows_k) for a row of task k.

    Shapes:  prompt [P, H] of all tasks, cols [tasks, P, R], rows [tasks, R, H]; task_ids [B]
    Grads:   prompt, cols, rows
    Raises:  ValueError without task_ids where there are several tasks, or for one that does not exist
    Source:  Wang et al. 2023, arXiv:2303.02861, equation 2
    """

    def __init__(self, task_type: str, num_virtual_tokens: int, submodules: int, width: int, tasks: int, rank: int):
        super().__init__(task_type, num_virtual_tokens, submodules, width)
        self.prefix_task_cols = nn.Parameter(0.02 * torch.randn(tasks, num_virtual_tokens * submodules, rank))
        self.prefix_task_rows = nn.Parameter(0.02 * torch.randn(tasks, rank, width))
        self.prompts_decoder = task_type == "SEQ_2_SEQ_LM" and submodules == 2

    def other_tensors(self) -> dict[str, torch.Tensor]:
        return {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}

    def vectors(self, rows: int, task_ids: torch.Tensor | None) -> torch.Tensor:
        tasks = len(self.prefix_task_cols)
        if task_ids is None:
            if tasks > 1:
                raise ValueError(f"task_ids: expected one of 0..{tasks - 1} for every row of the batch, got none")
            task_ids = torch.zeros(rows, dtype=torch.long)
        task_ids = torch.as_tensor(task_ids).reshape(-1)
        if len(task_ids) != rows or not bool(((task_ids >= 0) & (task_ids < tasks)).all()):
            raise ValueError(
                f"task_ids: expected {rows} of 0..{tasks - 1}, got {task_ids.tolist()[:8]} ({len(task_ids)})"
            )
        task_ids = task_ids.to(self.prefix_task_cols.device)
        return self.embedding.weight * (self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids])
