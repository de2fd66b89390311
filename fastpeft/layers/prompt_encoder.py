"""P-tuning: a small network makes the prompt from trained vectors (Liu et al. 2021, arXiv:2103.10385)."""

import torch
from torch import nn

from fastpeft.layers.prompt_inputs import InputPrompt


class PromptEncoder(InputPrompt):
    """prompt = MLP(e), or MLP(LSTM(e)) with a bidirectional LSTM over the P virtual tokens; without an encoder prompt = e.

    Shapes:  e, prompt [P, H]; the encoder's hidden width K, 2 K after the LSTM
    Grads:   e and the encoder. Only the prompt is saved for inference: load_prompt gives the encoder up
    Source:  Liu et al. 2021, arXiv:2103.10385, section 3
    """

    encoder_names = ("lstm_head", "mlp_head")

    def __init__(self, task_type: str, num_virtual_tokens: int, submodules: int, width: int):
        super().__init__(task_type, num_virtual_tokens)
        self.embedding = nn.Embedding(num_virtual_tokens * submodules, width)

    def add_mlp(self, hidden: int) -> None:
        """Three linear layers with ReLU between them."""
        width = self.embedding.embedding_dim
        self.mlp_head = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def add_lstm(self, hidden: int, layers: int, dropout: float) -> None:
        """A bidirectional LSTM, and two linear layers with a ReLU between them. dropout: between the LSTM's layers."""
        width = self.embedding.embedding_dim
        self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def prompt_embeddings(self) -> torch.Tensor:
        if not self.has_encoder():
            return self.embedding.weight
        vectors = self.embedding.weight[None]
        if hasattr(self, "lstm_head"):
            vectors = self.lstm_head(vectors)[0]
        return self.mlp_head(vectors)[0]
