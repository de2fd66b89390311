"""lora_glu_mlp as operators of torch.library: torch.compile, fake and meta tensors, opcheck."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft.ops import lora_mlp
from fastpeft.ops import lora_mlp_custom as operators
from fastpeft.ops.lora_group import Projection
from fastpeft.ops.lora_mlp import MEMORY, lora_glu_mlp
from fastpeft.ops.nf4 import quantize_4bit
from tests.ops.lora_mlp_cases import F32, NAMES, K, M, N, draw, leaves_of
from tests.tolerance import assert_bits_equal

ALL_DROPPED = (0.1, 0.3, 0.6)


@pytest.fixture(autouse=True)
def _as_function(monkeypatch):
    """The sizes here would all run as plain calls."""
    monkeypatch.setattr(lora_mlp, "composed_is_faster", lambda *call: False)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dropout", [(0.0,) * 3, ALL_DROPPED], ids=["", "dropout"])
def test_compiled(dropout, memory):
    torch.compiler.reset()
    x, members, dy = draw(F32, dropout=dropout, layout="3d")
    leaves = list(leaves_of(x, members).values())

    def call(x):
        return lora_glu_mlp(x, *members, impl="torch", memory=memory)

    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x)
    assert_bits_equal("y", got.detach(), want.detach())
    for one, two in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy)):
        assert_bits_equal("gradient", one, two)


OPCHECKED = {
    "balanced": (F32, {}),
    "speed_dropped": (F32, {"dropout": ALL_DROPPED}),
    "memory": (F32, {"bias": False}),
    "balanced_only_down": (F32, {"adapters": (False, False, True)}),
}


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name, monkeypatch):
    x, members, dy = draw(*OPCHECKED[name][:1], **OPCHECKED[name][1])
    seen = {}
    for which in ("lora_glu_mlp", "lora_glu_mlp_backward"):
        own = getattr(operators, which)
        monkeypatch.setattr(
            operators, which, lambda *given, own=own, which=which: seen.setdefault(which, given) and own(*given)
        )
    y = operators.traced_call(x, members, "gelu", name.split("_")[0], name == "memory", "torch")
    y.backward(dy)
    monkeypatch.undo()
    assert len(seen) == 2
    for which, arguments in seen.items():
        torch.library.opcheck(
            getattr(operators, which),
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("memory", MEMORY)
def test_fake_tensors_keep_what_real_ones_do(memory, impl):
    """A planner runs whole models on fake tensors; no kernel runs, no value is asked for."""
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with FakeTensorMode():
        x, members = _fake_inputs()
        with hooks:
            y = lora_glu_mlp(x, *members, memory=memory, impl=impl)
        exempt = {t.untyped_storage()._cdata for t in (x, *(t for member in members for t in member[:4]))}
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
        columns = {"speed": 3 * N, "balanced": 2 * N, "memory": 0}[memory]
        ranks = (0 if memory == "memory" else 3) * (4 if impl == "torch" else 16)  # the kernels' S is padded
        seeds = 3 * 8
        assert sum(size for place, size in sizes.items() if place not in exempt) == 4 * M * (columns + ranks) + seeds
        _check_shapes(y, x, members)


def test_meta_tensors_give_shapes():
    with torch.device("meta"):
        x, members = _fake_inputs()
        _check_shapes(lora_glu_mlp(x, *members), x, members)


def _fake_inputs():
    make = lambda *shape: torch.empty(*shape, requires_grad=True)  # noqa: E731
    shapes = ((N, K), (N, K), (K, N))
    members = [Projection(torch.empty(n, k), make(4, k), make(n, 4), make(n), dropout_p=0.1) for n, k in shapes]
    return make(M, K), members


def _check_shapes(y, x, members):
    inputs = [x, *(tensor for member in members for tensor in member[1:4])]
    assert y.shape == (M, K)
    assert [grad.shape for grad in torch.autograd.grad(y.sum(), inputs)] == [tensor.shape for tensor in inputs]


def test_compiled_over_a_quantised_base():
    torch.compiler.reset()
    x = torch.randn(5, 64, requires_grad=True)
    w = quantize_4bit(torch.randn(64, 64), double_quant=True)
    members = [Projection(w, torch.randn(2, 64, requires_grad=True), torch.randn(64, 2)) for _ in NAMES]
    want = lora_glu_mlp(x, *members, impl="torch")
    got = torch.compile(lambda x: lora_glu_mlp(x, *members, impl="torch"), fullgraph=True, backend="aot_eager")(x)
    assert_bits_equal("y", got.detach(), want.detach())
    for one, two in zip(*(torch.autograd.grad(y.sum(), [x, *(m.a for m in members)]) for y in (got, want))):
        assert_bits_equal("gradient", one, two)
