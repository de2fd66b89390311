"""A training step never waits for the device: no value of a tensor is read on the host, but for a CPU generator's seed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.ops import lora
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.int8 import quantize_int8
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_group import Projection, lora_linear_group
from fastpeft.ops.lora_rows import RowAdapter, lora_linear_rows
from fastpeft.ops.nf4 import quantize_4bit

M, N, K, R = 6, 24, 64, 5
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")


class CountReads(TorchDispatchMode):
    """Counts calls whose result depends on values that a GPU would have to deliver first."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in READS:
            self.reads.append(name)
        return function(*args, **(kwargs or {}))


BASES = {
    "dense": lambda w: w,
    "nf4": lambda w: quantize_4bit(w, double_quant=True),
    "int8": quantize_int8,
}
OPS = {
    "linear": lambda x, w, a, b, p, impl: lora_linear(x, w, a, b, dropout_p=p, impl=impl),
    "group": lambda x, w, a, b, p, impl: sum(
        lora_linear_group(x, [Projection(w, a, b, dropout_p=p), Projection(w, a, b)], impl=impl)
    ),
    "dora": lambda x, w, a, b, p, impl: dora_linear(x, w, a, b, b[:, 0], dropout_p=p, impl=impl),
    "rows": lambda x, w, a, b, p, impl: lora_linear_rows(
        x, w, [RowAdapter(a, b, 1.0)], [0, -1, 0, 0, -1, 0], impl=impl
    ),
}


@pytest.mark.watched
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_value_is_read(impl, op, base, dropout_p, device, monkeypatch):
    monkeypatch.setattr(lora, "_is_small", lambda *call: False)
    w = BASES[base](torch.randn(N, K, device=device))
    x, a, b = (torch.randn(*shape, device=device).requires_grad_() for shape in ((M, K), (R, K), (N, R)))

    def step():
        return torch.autograd.grad(OPS[op](x, w, a, b, dropout_p, impl).sum(), (x, a, b))

    step()  # tables that are made once
    with CountReads() as counted:
        step()
    seeds = 1 if dropout_p and op != "rows" else 0
    assert len(counted.reads) <= seeds, counted.reads


def test_the_counter_counts():
    with CountReads() as counted:
        torch.ones(2).sum().item()
        assert torch.ones(1)
    assert counted.reads == ["_local_scalar_dense"] * 2
