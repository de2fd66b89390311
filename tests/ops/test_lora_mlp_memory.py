"""What lora_glu_mlp holds: rows in parts, the norm's input in place of its output, and what checkpointing computes again."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastpeft.ops import lora_mlp
from fastpeft.ops.lora_mlp import MEMORY, lora_glu_mlp
from fastpeft.ops.nf4 import NF4Weight, quantize_4bit
from fastpeft.ops.norm import rms_norm
from tests.ops.lora_mlp_cases import BF16, F32, RANKS, K, M, N, draw, eager, exact, outcome
from tests.saved_bytes import SavedBytes
from tests.tolerance import assert_bits_equal, assert_no_worse


@pytest.fixture(autouse=True)
def _as_function(monkeypatch):
    monkeypatch.setattr(lora_mlp, "composed_is_faster", lambda *call: False)


@pytest.fixture
def parts(monkeypatch):
    """(rows of each part that forward takes, and backward), 16 where they take parts."""
    forward, backward = [], []
    monkeypatch.setattr(lora_mlp, "CHUNK_BYTES", 1)
    monkeypatch.setattr(lora_mlp, "CHUNK_ROWS", 16)
    for seen, name in ((forward, "_forward_of"), (backward, "_backward_of")):
        whole = getattr(lora_mlp, name)
        noted = functools.partial(
            lambda seen, whole, rows, *rest: seen.append(len(rows)) or whole(rows, *rest), seen, whole
        )
        monkeypatch.setattr(lora_mlp, name, noted)
    return forward, backward


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (BF16, {}),
        (BF16, {"adapter_dtype": BF16, "bias": False}),
        (F32, {"adapters": (True, True, False)}),
        (F32, {"adapters": (False, False, True)}),
    ],
    ids=["fp32", "bf16", "bf16_adapters", "down_without_adapter", "only_down"],
)
def test_rows_in_parts(dtype, options, memory, parts):
    x, members, dy = draw(dtype, **options)
    got = outcome(lambda x, members: lora_glu_mlp(x, *members, memory=memory, impl="torch"), x, members, dy)
    want, plain = exact(x, members, dy, "silu"), outcome(eager("silu"), x, members, dy)
    for name in want:
        assert_no_worse(name, got[name], want[name], plain[name])
    assert parts == ([16, 16, 1] if memory == "memory" else [M], [16, 16, 1])


def test_dropout_and_few_rows_over_quantised_weights_are_taken_whole(parts):
    x, members, dy = draw(F32, dropout=(0.1, 0.0, 0.0))
    outcome(lambda x, members: lora_glu_mlp(x, *members, impl="torch"), x, members, dy)
    x, members, dy = draw(F32)
    packed = [member._replace(w=quantize_4bit(member.w)) for member in members]
    outcome(lambda x, members: lora_glu_mlp(x, *members, impl="torch"), x, packed, dy)
    assert parts == ([M, M], [M, M])


@pytest.mark.parametrize("memory", MEMORY)
def test_many_rows_over_quantised_weights_are_taken_in_parts(memory, parts, monkeypatch):
    """Where three weights are less than what parts save. They are written out once in each pass, and the bits are theirs."""
    x, members, dy = draw(F32, rows=97)  # 2 (97 - 16) > 2 K
    packed = [member._replace(w=quantize_4bit(member.w)) for member in members]
    dense = [member._replace(w=member.w.dequantize(F32)) for member in packed]
    call = functools.partial(lora_glu_mlp, memory=memory, impl="torch")
    want = outcome(lambda x, members: call(x, *members), x, dense, dy)
    written = []
    whole = NF4Weight.dequantize
    monkeypatch.setattr(NF4Weight, "dequantize", lambda w, *of, **how: written.append(w) or whole(w, *of, **how))
    got = outcome(lambda x, members: call(x, *members), x, packed, dy)
    for name, value in want.items():
        assert_bits_equal(name, got[name], value)
    assert parts[1] == [16, 16, 16, 16, 16, 16, 1] * 2
    assert len(written) == 6


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator gave, but for views of `weights`."""

    def __init__(self, weights):
        super().__init__()
        self.elements, self.weights = 0, {w.untyped_storage().data_ptr() for w in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_whole_gate_exists_with_memory(parts):
    """x, y, dy and dx are whole, and no wider tensor; the other policies have one."""
    x, members, dy = draw(BF16, bias=False)
    largest = {}
    for memory in MEMORY:
        with _Largest([member.w for member in members]) as watch:
            lora_glu_mlp(x, *members, memory=memory, impl="torch").backward(dy)
        largest[memory] = watch.elements
    assert largest["memory"] == max(M * K, 16 * N)
    assert largest["balanced"] == largest["speed"] == M * N


def after_norm(memory):
    """(gradients of h, the norm's weight and the adapters; bytes kept) of an MLP behind a norm."""
    h, members, dy = draw(BF16)
    weight = torch.linspace(0.5, 1.5, K).requires_grad_()
    exempt = [h, weight, *(t for member in members for t in member[:4] if t is not None)]

    def mlp(h, members):
        x = rms_norm(h, weight, eps=1e-6, offset=1.0)
        return lora_glu_mlp(x, *members, memory=memory, impl="torch")

    with SavedBytes(exempt) as saved:
        y = mlp(h, members)
        kept = saved.total()
    del y
    weight.grad = None
    mlp(h, members).backward(dy)
    leaves = {"h": h, "weight": weight} | {
        f"{i}.{j}": t for i, member in enumerate(members) for j, t in enumerate(member[1:4]) if t is not None
    }
    return {name: tensor.grad for name, tensor in leaves.items()}, kept


@pytest.mark.parametrize("memory", ["balanced", "memory"])
def test_a_norm_s_output_is_computed_again(memory):
    """Bit for bit; "speed" keeps it, which is 2 M K bytes more, and three or one of gate, up and h."""
    want, speed = after_norm("speed")
    got, kept = after_norm(memory)
    for name, gradient in want.items():
        assert_bits_equal(name, got[name], gradient)
    wide, ranks = 2 * M * N, [2 * M * r for r in RANKS]
    rstd = speed - (2 * M * K + 3 * wide + sum(ranks))
    assert 0 < rstd <= 8 * M
    assert kept == rstd + (2 * wide + sum(ranks) if memory == "balanced" else 0)


@pytest.mark.parametrize("memory", ["balanced", "memory"])
def test_parts_of_a_norm_s_output_are_computed_again(memory, parts):
    want, got = after_norm("speed")[0], after_norm(memory)[0]
    for name, gradient in want.items():
        assert_bits_equal(name, got[name], gradient)
    assert parts[1] == [16, 16, 1] * 2


def test_parts_are_summed_in_float32():
    sums = lora_mlp._Sums()
    for value in [1.0] + [2.0**-9] * 64:  # each is lost beside 1 in bfloat16
        sums.add([torch.tensor([value], dtype=BF16), None])
    total, none = sums.rounded()
    assert none is None
    assert_bits_equal("sum", total, torch.tensor([1.125], dtype=BF16))


def test_nobody_changes_a_norm_s_output():
    """Else what is computed again would not be what was used."""
    x = rms_norm(draw(F32)[0], None, eps=1e-6)
    with pytest.raises(RuntimeError, match="modified inplace"):
        x.detach().mul_(2).add(x.mul_(2))


def test_an_input_changed_before_backward_is_refused():
    h, members, dy = draw(F32)
    h = (h * 1.0).detach().requires_grad_()
    y = lora_glu_mlp(rms_norm(h, None, eps=1e-6), *members, impl="torch")
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


# -- what is kept first -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "times"), [("balanced", 2), ("memory", 1)])
def test_checkpointing_does_not_compute_memory_s_again(memory, times, parts):
    """It computes up to the last tensor that was kept, which "memory" keeps before it computes."""
    x, members, dy = draw(F32, dropout=(0.1, 0.3, 0.6))
    call = functools.partial(lora_glu_mlp, memory=memory, impl="torch")
    want = outcome(lambda x, members: call(x, *members), x, members, dy)
    parts[0].clear()
    got = outcome(lambda x, members: checkpoint(lambda x: call(x, *members), x, use_reentrant=False), x, members, dy)
    for name, value in want.items():
        assert_bits_equal(name, got[name], value)
    assert parts[0] == [M] * times


def test_x_without_a_gradient_gets_none():
    x, members, dy = draw(F32)
    want = outcome(lambda x, members: lora_glu_mlp(x, *members, memory="memory", impl="torch"), x, members, dy)
    x.requires_grad_(False)
    got = outcome(lambda x, members: lora_glu_mlp(x, *members, memory="memory", impl="torch"), x, members, dy)
    assert set(want) - set(got) == {"dx"}
    assert not lora_glu_mlp(x, *members, memory="memory", impl="torch").grad_fn.needs.x  # nor is it computed
    for name, value in got.items():
        assert_bits_equal(name, value, want[name])


def test_what_was_kept_first_goes_with_backward():
    x, members, dy = draw(F32)
    y = lora_glu_mlp(x, *members, memory="memory", impl="torch")
    y.backward(dy)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)
