"""lora_linear_group against the float64 reference: every member's y and every gradient no worse than eager code."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastpeft.ops import lora_group
from fastpeft.ops.dropout import LEVELS, keep_mask, threshold_of
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_group import Projection, lora_linear_group
from fastpeft.ops.nf4 import quantize_4bit
from fastpeft.reference.lora_group import lora_linear_group as reference
from tests.ops.lora_cases import kernels_mask, moved
from tests.saved_bytes import SavedBytes
from tests.tolerance import assert_bits_equal, assert_no_worse

F32, BF16 = torch.float32, torch.bfloat16
M, K = 33, 97
WIDTHS, RANKS = (65, 17, 40), (5, 1, 8)  # N and R of three members; the last one has no bias
SEEDS = (11, 22, 33)


@pytest.fixture(autouse=True)
def _as_functions(monkeypatch):
    """The sizes here would all run as plain calls."""
    monkeypatch.setattr(lora_group, "composed_is_faster", lambda *call: False)


def draw(dtype, adapter_dtype=F32, *, layout="rows", dropout=(0.0, 0.0, 0.0), adapters=(True, True, True)):
    """x, [Projection], [dy]: leaves that require a gradient, but for w."""
    generator = torch.Generator().manual_seed(5)
    normal = lambda *shape, std=1.0: torch.randn(*shape, generator=generator) * std  # noqa: E731
    x = {"rows": lambda: normal(M, K), "3d": lambda: normal(3, 11, K), "transposed": lambda: normal(K, M).t()}[layout]()
    members = [
        Projection(
            normal(n, K).to(dtype),
            normal(r, K, std=K**-0.5).to(adapter_dtype).requires_grad_(True) if has_adapter else None,
            normal(n, r).to(adapter_dtype).requires_grad_(True) if has_adapter else None,
            normal(n).to(dtype).requires_grad_(True) if n != WIDTHS[-1] else None,
            0.5 + r,
            p,
            seed,
        )
        for n, r, p, seed, has_adapter in zip(WIDTHS, RANKS, dropout, SEEDS, adapters)
    ]
    return x.to(dtype).requires_grad_(True), members, [normal(*x.shape[:-1], n).to(dtype) for n in WIDTHS]


def leaves_of(x, members):
    named = {"x": x}
    for i, member in enumerate(members):
        named |= {f"{name}{i}": t for name, t in zip(("a", "b", "bias"), member[1:4]) if t is not None}
    return named


def outcome(function, x, members, dys):
    leaves = leaves_of(x, members)
    ys = function(x, members)
    gradients = torch.autograd.grad(ys, list(leaves.values()), dys)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | named


def masks(x, members):
    thresholds = [threshold_of(member.dropout_p) for member in members]
    return [
        keep_mask(seed=member.seed, like=x, threshold=threshold).bool() if threshold else None
        for member, threshold in zip(members, thresholds)
    ]


def eager(x, members):
    """One after another in x's dtype."""
    ys = []
    for member, keep in zip(members, masks(x, members)):
        y = F.linear(x, member.w, member.bias)
        if member.a is not None:
            dropped = x if keep is None else x * keep / (1 - member.dropout_p)
            low_rank = F.linear(F.linear(dropped, member.a.to(x.dtype)), member.b.to(x.dtype))
            y = y + low_rank * member.scale
        ys.append(y)
    return ys


def exact(x, members, dys):
    wide = lambda t: None if t is None else t.detach().double().requires_grad_(t.requires_grad)  # noqa: E731
    keeps = masks(x, members)
    members = [
        Projection(*map(wide, member[:4]), member.scale, threshold_of(member.dropout_p) / LEVELS) for member in members
    ]
    return outcome(lambda *t: reference(*t, keeps), wide(x), members, [dy.double() for dy in dys])


def check(x, members, dys, plain=eager, **options):
    got = outcome(lambda *t: lora_linear_group(*t, **options), x, members, dys)
    want, eagerly = exact(x, members, dys), outcome(plain, x, members, dys)
    assert list(got) == list(want)
    for name in want:
        assert_no_worse(f"{name} of {options}", got[name], want[name], eagerly[name])


ONE_DROPPED, ALL_DROPPED = (0.0, 0.3, 0.0), (0.1, 0.3, 0.6)
CASES = {
    "float32": (F32, {}),
    "bfloat16": (BF16, {}),
    "bfloat16_adapters": (BF16, {"adapter_dtype": BF16}),
    "3d": (F32, {"layout": "3d"}),
    "transposed_x": (BF16, {"layout": "transposed"}),
    "one_dropped": (F32, {"dropout": ONE_DROPPED}),
    "all_dropped_bf16_3d": (BF16, {"dropout": ALL_DROPPED, "layout": "3d"}),
    "one_without_adapter": (F32, {"adapters": (True, False, True)}),
    "leader_without_adapter": (F32, {"adapters": (False, True, True), "dropout": ALL_DROPPED}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_no_worse_than_eager(name, impl):
    dtype, options = CASES[name]
    check(*draw(dtype, **options), impl=impl)


@pytest.mark.watched
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("name", CASES)
def test_triton_no_worse_than_eager(name, base, device, monkeypatch):
    """The wiring of the kernels into autograd, over dense weights in one launch and over quantised ones in turn."""
    monkeypatch.setitem(globals(), "keep_mask", kernels_mask)
    monkeypatch.setattr(lora_group, "composed_is_faster", lambda *call: False)
    dtype, options = CASES[name]
    x, members, dys = draw(dtype, **options)
    members = [Projection(*(moved(t, device) for t in member[:4]), *member[4:]) for member in members]
    x, dys = moved(x, device), [dy.to(device) for dy in dys]
    stored = [quantize_4bit(member.w, double_quant=True) for member in members] if base == "nf4" else None
    if stored:
        members = [member._replace(w=w.dequantize(dtype)) for member, w in zip(members, stored)]

    def call(x, members, **options):
        used = [member._replace(w=w) for member, w in zip(members, stored)] if stored else members
        return lora_linear_group(x, used, **options)

    got = outcome(lambda *t: call(*t, impl="triton"), x, members, dys)
    want, eagerly = exact(x, members, dys), outcome(eager, x, members, dys)
    for each in want:
        assert_no_worse(each, got[each], want[each], eagerly[each])


@pytest.mark.parametrize("dropout", [(0.0,) * 3, ALL_DROPPED], ids=["", "dropout"])
def test_exact_is_no_worse_than_float32_products(dropout):
    """da and db over a bfloat16 base are as exact as PEFT's, which keeps a float32 copy of x per linear for it."""

    def peft(x, members):
        ys = []
        for member, keep in zip(members, masks(x, members)):
            wide = x.float() if keep is None else x.float() * keep / (1 - member.dropout_p)
            low_rank = F.linear(F.linear(wide, member.a), member.b) * member.scale
            ys.append((F.linear(x, member.w, member.bias) + low_rank).to(x.dtype))
        return ys

    check(*draw(BF16, dropout=dropout), plain=peft, impl="torch", exact=True)


@pytest.mark.parametrize("exact", [False, True])
def test_keeps_x_and_the_s_in_one_buffer(exact):
    x, members, _ = draw(BF16, layout="transposed", dropout=(0.0, 0.0, 0.5))
    own = [t for member in members for t in member[:4] if t is not None]
    with SavedBytes([x, *own]) as saved:
        ys = lora_linear_group(x, members, impl="torch", exact=exact)
    assert saved.total() == M * sum(RANKS) * (4 if exact else 2), saved.storages()
    sum(y.sum() for y in ys).backward()
    assert saved.total() == 0


def test_keeps_nothing_of_a_quantised_weight():
    x, members, dys = draw(F32)
    packed = [quantize_4bit(torch.randn(n, 64)) for n in WIDTHS]
    x = torch.randn(M, 64, requires_grad=True)
    members = [
        member._replace(w=w, a=torch.randn(r, 64, requires_grad=True)) for member, w, r in zip(members, packed, RANKS)
    ]
    with SavedBytes([x, *(t for member in members for t in member[1:4] if t is not None)]) as saved:
        ys = lora_linear_group(x, members, impl="torch")
    assert saved.total() == M * sum(RANKS) * 4, saved.storages()
    got = outcome(lambda *t: ys, x, members, dys)
    dense = [member._replace(w=member.w.dequantize(F32)) for member in members]
    for name, value in outcome(lambda *t: lora_linear_group(*t, impl="torch"), x, dense, dys).items():
        assert_bits_equal(name, got[name], value)


@pytest.mark.parametrize("used", [[0], [2], [0, 2]], ids=str)
def test_outputs_that_nobody_uses_have_no_gradient(used):
    x, members, dys = draw(F32, dropout=ONE_DROPPED)
    ys = lora_linear_group(x, members, impl="torch")
    sum((ys[i] * dys[i]).sum() for i in used).backward()
    got = {name: leaf.grad for name, leaf in leaves_of(x, members).items()}
    want = exact(x, members, [dy if i in used else torch.zeros_like(dy) for i, dy in enumerate(dys)])
    plain = outcome(eager, x, members, [dy if i in used else torch.zeros_like(dy) for i, dy in enumerate(dys)])
    for name, gradient in got.items():
        if name != "x" and int(name[-1]) not in used:
            assert gradient is None or not gradient.any(), name
        else:
            assert_no_worse(f"d{name}", gradient, want[f"d{name}"], plain[f"d{name}"])


@pytest.mark.parametrize(("frozen", "dropout"), product(["x", "a0", "b2", "bias0"], [(0.0,) * 3, ALL_DROPPED]))
def test_only_what_is_needed_is_computed(frozen, dropout):
    x, members, dys = draw(F32, dropout=dropout)
    everything = outcome(lambda *t: lora_linear_group(*t, impl="torch"), x, members, dys)
    leaves_of(x, members)[frozen].requires_grad_(False)
    ys = lora_linear_group(x, members, impl="torch")
    torch.autograd.backward(ys, dys)
    for name, leaf in leaves_of(x, members).items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert_bits_equal(f"d{name}", leaf.grad, everything[f"d{name}"])


def test_two_backwards_are_equal():
    x, members, dys = draw(BF16, dropout=ONE_DROPPED)
    leaves, ys = list(leaves_of(x, members).values()), lora_linear_group(x, members, impl="torch")
    first = torch.autograd.grad(ys, leaves, dys, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(ys, leaves, dys)):
        assert_bits_equal("second backward", two, one)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_small_calls_and_one_by_one_are_lora_linear(dtype, monkeypatch):
    """What has no Function for all, or is too small for it, is the members one after another, bit for bit."""
    monkeypatch.setattr(lora_group, "composed_is_faster", lambda *call: True)
    x, members, dys = draw(dtype, dropout=ONE_DROPPED)

    def alone(x, members):
        return [
            lora_linear(x, m.w, m.a, m.b, m.bias, scale=m.scale, dropout_p=m.dropout_p, seed=m.seed) for m in members
        ]

    want = outcome(alone, x, members, dys)
    for name, value in outcome(lora_linear_group, x, members, dys).items():
        assert_bits_equal(name, value, want[name])


def test_seeds_are_drawn_in_order():
    """As by the members one after another, so that grouping changes no mask."""
    x, members, _ = draw(F32, dropout=ALL_DROPPED)
    members = [member._replace(seed=None) for member in members]
    torch.manual_seed(3)
    together = lora_linear_group(x, members, impl="torch")
    torch.manual_seed(3)
    apart = [lora_linear_group(x, [member], impl="torch")[0] for member in members]
    for i, (one, two) in enumerate(zip(together, apart)):
        assert_bits_equal(f"y{i}", one, two)


def test_autocast_takes_everything_in_its_dtype():
    x, members, _ = draw(F32)
    with torch.autocast("cpu", dtype=BF16):
        ys = lora_linear_group(x, members, impl="torch")
        apart = [lora_linear_group(x, [member], impl="torch")[0] for member in members]
    assert {y.dtype for y in ys} == {BF16}
    for one, two in zip(ys, apart):
        assert_bits_equal("y", one, two)


def test_autocast_also_where_the_members_are_computed_alone(monkeypatch):
    """Few rows of a small float32 base: x was cast for autocast, the weights were not, and lora_linear refused them."""
    monkeypatch.setattr(lora_group, "composed_is_faster", lambda *call: True)
    x, members, _ = draw(F32)
    with torch.autocast("cpu", dtype=BF16):
        for count in (1, len(members)):
            group, apart = lora_linear_group(x, members[:count], impl="torch"), []
            for w, a, b, bias, scale, dropout_p, seed in members[:count]:
                apart.append(lora_linear(x, w, a, b, bias, scale=scale, dropout_p=dropout_p, seed=seed, impl="torch"))
            for one, two in zip(group, apart, strict=True):
                assert_bits_equal("y", one, two)


def test_no_rows():
    x, members, _ = draw(F32)
    ys = lora_linear_group(x.detach()[:0], members)
    assert [tuple(y.shape) for y in ys] == [(0, n) for n in WIDTHS]


BAD_MEMBERS = {
    "w_other_width": ({"w": torch.zeros(6, 8)}, ["x (4, 7)", "w (6, 8)"]),
    "b_transposed": ({"b": torch.zeros(2, 6)}, ["b (2, 6)", "is b transposed?"]),
    "a_without_b": ({"b": None}, ["or neither", "a (2, 7)"]),
    "bias_other_width": ({"bias": torch.zeros(7)}, ["bias (7,)"]),
    "half_w": ({"w": torch.zeros(6, 7, dtype=BF16)}, ["w torch.bfloat16", "autocast"]),
    "meta_a": ({"a": torch.zeros(2, 7, device="meta")}, ["one device", "a meta"]),
    "dropout_one": ({"dropout_p": 1.0}, ["0 <= dropout_p < 1, got 1.0"]),
    "trained_w": ({"w": torch.zeros(6, 7, requires_grad=True)}, ["frozen w"]),
}


@pytest.mark.parametrize(("changes", "said"), BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_a_bad_member_is_named(changes, said):
    good = Projection(torch.zeros(6, 7), torch.zeros(2, 7), torch.zeros(6, 2))
    with pytest.raises(ValueError) as caught:
        lora_linear_group(torch.zeros(4, 7), [good, good._replace(**changes)])
    assert all(text in str(caught.value) for text in [*said, "lora_linear_group: member 1"]), caught.value
    assert "\n" not in str(caught.value)
