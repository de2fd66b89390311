"""lora_glu_mlp against the float64 reference: y and every gradient no worse than eager code, under every memory policy."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft.ops import lora_mlp
from fastpeft.ops.glu import ACTIVATIONS
from fastpeft.ops.int8 import quantize_int8
from fastpeft.ops.lora_group import Projection
from fastpeft.ops.lora_mlp import MEMORY, lora_glu_mlp
from fastpeft.ops.nf4 import quantize_4bit
from tests.ops import lora_mlp_cases
from tests.ops.lora_cases import kernels_mask, moved
from tests.ops.lora_mlp_cases import BF16, F16, F32, RANKS, K, M, N, draw, eager, exact, leaves_of, outcome
from tests.saved_bytes import SavedBytes
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, assert_no_worse


@pytest.fixture(autouse=True)
def _as_function(monkeypatch):
    """The sizes here would all run as plain calls."""
    monkeypatch.setattr(lora_mlp, "composed_is_faster", lambda *call: False)


def op(**options):
    return lambda x, members: lora_glu_mlp(x, *members, **options)


def check(x, members, dy, activation="silu", plain=None, **options):
    got = outcome(op(activation=activation, **options), x, members, dy)
    want = exact(x, members, dy, activation)
    eagerly = outcome(plain or eager(activation), x, members, dy)
    assert list(got) == list(want)
    for name in want:
        assert_no_worse(f"{name} of {options}", got[name], want[name], eagerly[name])


DOWN_DROPPED, ALL_DROPPED = (0.0, 0.0, 0.3), (0.1, 0.3, 0.6)
CASES = {
    "float32": (F32, {}),
    "bfloat16": (BF16, {}),
    "float16": (F16, {"adapter_dtype": F16}),
    "bfloat16_adapters": (BF16, {"adapter_dtype": BF16, "bias": False}),
    "3d": (F32, {"layout": "3d"}),
    "transposed_x": (BF16, {"layout": "transposed"}),
    "one_row": (F32, {"rows": 1}),
    "down_dropped": (F32, {"dropout": DOWN_DROPPED}),
    "all_dropped_3d": (BF16, {"dropout": ALL_DROPPED, "layout": "3d"}),
    "down_without_adapter": (F32, {"adapters": (True, True, False)}),
    "gate_without_adapter": (F32, {"adapters": (False, True, True), "dropout": DOWN_DROPPED}),
    "only_down": (F32, {"adapters": (False, False, True)}),
    "none": (BF16, {"adapters": (False,) * 3}),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", CASES)
def test_torch_no_worse_than_eager(name, memory):
    dtype, options = CASES[name]
    check(*draw(dtype, **options), impl="torch", memory=memory)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_every_activation(dtype, impl, activation):
    check(*draw(dtype), activation, impl=impl)


@pytest.mark.watched
@pytest.mark.parametrize("name", ["float32", "bfloat16", "all_dropped_3d", "only_down", "down_without_adapter"])
def test_triton_no_worse_than_eager(name, device, monkeypatch):
    monkeypatch.setattr(lora_mlp_cases, "keep_mask", kernels_mask)
    dtype, options = CASES[name]
    x, members, dy = draw(dtype, **options)
    members = [Projection(*(moved(t, device) for t in member[:4]), *member[4:]) for member in members]
    check(moved(x, device), members, dy.to(device), "gelu_tanh", impl="triton")


@pytest.mark.watched
@pytest.mark.parametrize(("impl", "base"), [("torch", "nf4"), ("torch", "int8"), ("triton", "nf4")])
def test_the_policies_give_the_same_bits_over_every_base(impl, base, device):
    x, members, dy = draw(BF16, dropout=DOWN_DROPPED, rows=17)
    store = quantize_int8 if base == "int8" else lambda w: quantize_4bit(w, double_quant=True)
    used = [
        Projection(store(torch.randn(n, k, device=device) / 8), *(moved(t, device) for t in cut), *member[4:])
        for member, n, k in zip(members, (64, 64, 64), (64, 64, 64))
        for cut in [(member.a[:, :64], member.b[:64], None if member.bias is None else member.bias[:64])]
    ]
    for member in used:
        member.a.requires_grad_()
        member.b.requires_grad_()
    x, dy = moved(x[:, :64], device), dy[:, :64].to(device)
    results = [outcome(op(impl=impl, memory=memory), x, used, dy) for memory in MEMORY]
    dense = [member._replace(w=member.w.dequantize(BF16)) for member in used]
    for name, value in results[0].items():
        assert_bits_equal(f"balanced {name}", results[1][name], value)
        assert_bits_equal(f"memory {name}", results[2][name], value)
    for name, value in outcome(op(impl=impl), x, dense, dy).items():
        if impl == "torch":
            assert_bits_equal(f"dense {name}", results[0][name], value)


@pytest.mark.parametrize("name", ["float32", "all_dropped_3d", "only_down", "bfloat16"])
def test_the_policies_give_the_same_bits(name):
    dtype, options = CASES[name]
    x, members, dy = draw(dtype, **options)
    first = outcome(op(impl="torch", memory="speed"), x, members, dy)
    for memory in MEMORY[1:]:
        for each, value in outcome(op(impl="torch", memory=memory), x, members, dy).items():
            assert_bits_equal(f"{memory} {each}", value, first[each])


@pytest.mark.parametrize("dropout", [(0.0,) * 3, ALL_DROPPED], ids=["", "dropout"])
@pytest.mark.parametrize("memory", MEMORY)
def test_exact_is_no_worse_than_float32_products(memory, dropout):
    """As PEFT's low-rank path over a bfloat16 base, which keeps float32 copies of x and h for it."""
    check(*draw(BF16, dropout=dropout), plain=eager("silu", wide=F32), impl="torch", exact=True, memory=memory)


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("memory", MEMORY)
def test_what_is_kept(memory, exact):
    x, members, dy = draw(BF16, layout="transposed", dropout=DOWN_DROPPED)
    own = [t for member in members for t in member[:4] if t is not None]
    with SavedBytes([x, *own]) as saved:
        y = lora_glu_mlp(x, *members, impl="torch", memory=memory, exact=exact)
    columns = {"speed": 3 * N, "balanced": 2 * N, "memory": 0}[memory] * 2
    ranks = (0 if memory == "memory" else sum(RANKS)) * (4 if exact else 2)
    assert saved.total() == M * (columns + ranks), saved.storages()
    y.backward(dy)
    assert saved.total() == 0


def test_what_is_kept_where_only_down_is_trained():
    x, members, dy = draw(F32, adapters=(False, False, True), bias=False)
    x.requires_grad_(False)
    for memory, columns in {"speed": N, "balanced": 2 * N, "memory": K}.items():
        with SavedBytes([member.w for member in members] + list(members[2][1:3])) as saved:
            y = lora_glu_mlp(x, *members, impl="torch", memory=memory)
        ranks = 0 if memory == "memory" else RANKS[2]
        assert saved.total() == M * (columns + ranks) * 4, (memory, saved.storages())
        y.backward(dy)
    members[2].a.requires_grad_(False)
    for memory in MEMORY:
        with SavedBytes([member.w for member in members] + list(members[2][1:3])) as saved:
            y = lora_glu_mlp(x, *members, impl="torch", memory=memory)
        assert saved.total() == M * RANKS[2] * 4, (memory, saved.storages())
        y.backward(dy)


def test_nothing_is_kept_without_gradients():
    x, members, _ = draw(F32)
    want = lora_glu_mlp(x, *members, impl="torch").detach()
    with torch.no_grad(), SavedBytes() as saved:
        assert_bits_equal("no_grad", lora_glu_mlp(x, *members, impl="torch"), want)
    assert saved.total() == 0
    with torch.inference_mode():
        assert_bits_equal("inference_mode", lora_glu_mlp(x, *members, impl="torch"), want)


FROZEN = ["x", "gate.a", "gate.b", "up.a", "up.bias", "down.a", "down.b"]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("frozen", FROZEN)
def test_only_what_is_needed_is_computed(frozen, memory):
    x, members, dy = draw(F32, dropout=ALL_DROPPED)
    everything = outcome(op(impl="torch", memory=memory), x, members, dy)
    leaves = leaves_of(x, members)
    leaves[frozen].requires_grad_(False)
    lora_glu_mlp(x, *members, impl="torch", memory=memory).backward(dy)
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert_bits_equal(f"d{name}", leaf.grad, everything[f"d{name}"])


@pytest.mark.watched
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_inputs_stay_and_two_backwards_are_equal(impl, memory, device):
    """Backward reuses h's and dh's memory, which must be its own: not dy, not what the graph keeps for a second time."""
    x, members, dy = draw(BF16, dropout=DOWN_DROPPED, rows=17)
    members = [Projection(*(moved(t, device) for t in member[:4]), *member[4:]) for member in members]
    x, dy = moved(x, device), dy.to(device)
    leaves, y = list(leaves_of(x, members).values()), lora_glu_mlp(x, *members, impl=impl, memory=memory)
    before = [t.detach().clone() for t in (*leaves, dy, y, *(member.w for member in members))]
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(y, leaves, dy)):
        assert_bits_equal("second backward", two, one)
    for one, two in zip((*leaves, dy, y, *(member.w for member in members)), before):
        assert_bits_equal("an input", one.detach(), two)


def test_dy_of_any_strides():
    x, members, dy = draw(F32)
    want = outcome(op(impl="torch"), x, members, dy)
    for given in (dy.t().contiguous().t(), torch.cat([dy, dy], 1)[:, :K]):
        for name, value in outcome(op(impl="torch"), x, members, given).items():
            assert_close(name, value, want[name], OTHER_ORDER_OF_SUMS)
    x, members, _ = draw(F32)
    leaves = list(leaves_of(x, members).values())
    one = torch.autograd.grad(lora_glu_mlp(x, *members, impl="torch").sum(), leaves)  # dy expanded from a scalar
    for got, want in zip(one, torch.autograd.grad(eager("silu")(x, members).sum(), leaves)):
        assert_close("expanded dy", got, want, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant, memory):
    x, members, dy = draw(F32, dropout=ALL_DROPPED)
    members = [member._replace(seed=None) for member in members]
    torch.manual_seed(5)
    plain = outcome(op(impl="torch", memory=memory), x, members, dy)
    torch.manual_seed(5)
    checkpoint(lambda x: lora_glu_mlp(x, *members, impl="torch", memory=memory), x, use_reentrant=reentrant).backward(
        dy
    )
    for name, leaf in leaves_of(x, members).items():
        assert_bits_equal(name, leaf.grad, plain[f"d{name}"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_small_calls_are_three_calls(dtype, monkeypatch):
    """With the same masks, as seeds are drawn in the same order."""
    x, members, dy = draw(dtype, dropout=ALL_DROPPED)
    unseeded = [member._replace(seed=None) for member in members]
    torch.manual_seed(3)
    want = lora_glu_mlp(x, *unseeded, impl="torch").detach()
    monkeypatch.setattr(lora_mlp, "composed_is_faster", lambda *call: True)
    check(x, members, dy, impl="torch")
    torch.manual_seed(3)
    got = lora_glu_mlp(x, *unseeded, impl="torch").detach()
    assert_no_worse("y", got, want.double(), want.to(BF16).to(dtype))
    with torch.autocast("cpu", dtype=BF16):
        assert lora_glu_mlp(x, *members).dtype == BF16


def test_autocast_takes_everything_in_its_dtype():
    x, members, dy = draw(F32, bias=False)
    with torch.autocast("cpu", dtype=BF16):
        y = lora_glu_mlp(x, *members, impl="torch")
    assert y.dtype == BF16
    y.backward(dy.to(BF16))
    half = [member._replace(w=member.w.to(BF16)) for member in members]
    assert_bits_equal("y", y.detach(), lora_glu_mlp(x.detach().to(BF16), *half, impl="torch").detach())
    assert x.grad.dtype == F32
    assert members[0].a.grad.dtype == F32


def test_torch_func_is_not_broken():
    x, members, _ = draw(F32, bias=False)
    gate = members[0]

    def loss(a):
        return lora_glu_mlp(x.detach(), gate._replace(a=a), *members[1:]).square().sum()

    got = torch.func.grad(loss)(gate.a.detach())
    want = torch.autograd.grad(loss(gate.a), gate.a)[0]
    assert_close("da", got / want.abs().max(), want / want.abs().max(), OTHER_ORDER_OF_SUMS)


def test_a_second_differentiation_is_refused_by_name():
    x, members, _ = draw(F32)
    (dx,) = torch.autograd.grad(lora_glu_mlp(x, *members, impl="torch").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_glu_mlp: expected first-order gradients"):
        dx.sum().backward()


def test_no_rows():
    x, members, _ = draw(F32)
    assert lora_glu_mlp(x.detach()[:0], *members).shape == (0, K)


BAD = {
    "up_wider": (
        (1, {"w": torch.zeros(8, 7), "b": torch.zeros(8, 2)}),
        {},
        r"gate and up of one shape.*\(6, 7\).*\(8, 7\)",
    ),
    "up_b": ((1, {"b": torch.zeros(2, 6)}), {}, "lora_glu_mlp: up: .*is b transposed"),
    "down": ((2, {"w": torch.zeros(7, 5)}), {}, r"lora_glu_mlp: down, where x is h.*w \(7, 5\)"),
    "gate_dtype": ((0, {"w": torch.zeros(6, 7, dtype=BF16)}), {}, "lora_glu_mlp: gate: .*autocast"),
    "trained": ((2, {"w": torch.zeros(7, 6, requires_grad=True)}), {}, "down.*frozen w"),
    "activation": ((0, {}), {"activation": "relu"}, "activation in .*'relu'"),
    "memory": ((0, {}), {"memory": "low"}, "memory in .*'low'"),
}


@pytest.mark.parametrize(("change", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, options, message):
    outer = Projection(torch.zeros(6, 7), torch.zeros(2, 7), torch.zeros(6, 2))
    members = [outer, outer, Projection(torch.zeros(7, 6), torch.zeros(2, 6), torch.zeros(7, 2))]
    index, changes = change
    members[index] = members[index]._replace(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        lora_glu_mlp(torch.zeros(4, 7), *members, **options)
    assert "\n" not in str(caught.value)
