"""Shapes of public models, as the cases use them: K is the hidden size."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One model. kv: rows of its key and value projections; vocabulary: of its head."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def linear(self, site: str) -> tuple[int, int]:
        """(N, K) of the linear called `site`."""
        kv = self.kv_heads * self.head_dim
        return {
            "q": (self.heads * self.head_dim, self.hidden),
            "k": (kv, self.hidden),
            "gate": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }[site]


SHAPES = {
    "MiniLM": Shape(384, 1536, 12, 12, 32, 30522),
    "SmolLM2-135M": Shape(576, 1536, 9, 3, 64, 49152),
    "Qwen2.5-7B": Shape(3584, 18944, 28, 4, 128, 152064),
    "Llama-3-8B": Shape(4096, 14336, 32, 8, 128, 128256),
    "Llama-3-70B": Shape(8192, 28672, 64, 8, 128, 128256),
}
