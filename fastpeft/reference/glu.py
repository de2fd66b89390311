"""Gated linear units, written the way the paper states them.

    h = act(gate) * up
    silu       act(g) = g / (1 + exp(-g))
    gelu       act(g) = g (1 + erf(g / sqrt(2))) / 2
    gelu_tanh  act(g) = g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2

Shapes:  gate, up [..., N] -> h [..., N]
Dtypes:  any floating dtype up to float64; everything is promoted by PyTorch's own rules
Source:  Shazeer 2020, arXiv:2002.05202, section 2; gelu: Hendrycks and Gimpel 2016, arXiv:1606.08415
"""

import math

import torch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up for one of ACTIVATIONS."""
    return act(gate, activation) * up


def act(g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return g * torch.sigmoid(g)  # 1 / (1 + exp(-g)), whose gradient is finite for every g
    if activation == "gelu":
        return g * (1 + torch.erf(g / math.sqrt(2))) / 2
    if activation == "gelu_tanh":
        return g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2
    raise ValueError(f"act: expected one of {ACTIVATIONS}, got {activation!r}")


def halves(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up of [..., 2N], as views: the first N columns and the last N."""
    n = packed.shape[-1] // 2
    return packed[..., :n], packed[..., n:]
