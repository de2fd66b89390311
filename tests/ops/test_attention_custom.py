"""Citizenship of attention: torch.library, torch.compile, fake and meta tensors, checkpointing; memory while traced."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastpeft.ops.attention import RelativeBias, attention
from tests.ops.attention_cases import by_op, draw
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

TERMS = {
    "plain": {},
    "causal": {"causal": True},
    "bf16": {"causal": True, "dtype": torch.bfloat16},
    "longer keys": {"causal": True, "sk": 13},
    "window": {"window": (3, 2)},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": (1, 1, 1)},
    "bias of heads": {"bias": (0, 1, 1), "causal": True},
    "relative": {"relative": True},
    "alibi": {"alibi": "batch", "causal": True},
    "sinks": {"sinks": True, "causal": True},
    "padding": {"padding": "left", "causal": True},
    "packed": {"packed": [(3, 3), (1, 4), (5, 5)], "causal": True},
    "all": {"bias": (0, 1, 1), "relative": False, "alibi": "heads", "sinks": True, "padding": "right", "softcap": 2.0},
}


def step(tensors, terms, do, options):
    """(o, gradients) of the public op: what torch.compile is given."""
    return tuple(by_op(tensors, terms, do, **options).values())


def run(tensors, terms, impl, **options):
    """(o, leaves) of the public op."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    named = {name: value for name, value in leaves.items() if name != "table"}
    if "table" in leaves:
        named["relative_bias"] = RelativeBias(leaves["table"], **terms["relative"])
    others = {name: value for name, value in terms.items() if name != "relative"}
    return attention(**named, **others, impl=impl, **options), list(leaves.values())


def compiled(impl, backend="aot_eager", **options):
    torch.compiler.reset()

    def call(tensors, terms):
        named = {name: value for name, value in tensors.items() if name != "table"}
        if "table" in tensors:
            named["relative_bias"] = RelativeBias(tensors["table"], **terms["relative"])
        others = {name: value for name, value in terms.items() if name != "relative"}
        return attention(**named, **others, impl=impl, **options)

    return torch.compile(call, fullgraph=True, backend=backend)


def compare(function, tensors, terms, do, impl, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    o = function(leaves, terms)
    expected, eager = run(tensors, terms, impl, **options)
    assert_close("o", o, expected, OTHER_ORDER_OF_SUMS)
    grads = torch.autograd.grad(o, list(leaves.values()), do)
    for name, got, want in zip(leaves, grads, torch.autograd.grad(expected, eager, do), strict=True):
        assert_close(f"d{name}", got, want, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("term", TERMS)
def test_compiled_is_eager(term):
    compare(compiled("torch"), *draw(**TERMS[term]), "torch")


@pytest.mark.parametrize("term", ["all"])
def test_compiled_by_inductor_is_eager(term):
    compare(compiled("torch", backend="inductor"), *draw(**TERMS[term]), "torch")


@pytest.mark.parametrize("term", ["causal", "sinks"])
@pytest.mark.watched
def test_compiled_with_kernels_is_eager(term, device):
    compare(compiled("triton"), *draw(**TERMS[term], d=16, device=device), "triton")


def test_other_lengths_are_the_same_graph():
    torch._dynamo.utils.counters.clear()
    function = compiled("torch")
    for tokens in (9, 12, 15, 20):
        compare(function, *draw(sq=tokens, sk=tokens, softcap=2.0, causal=True), "torch")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of the first length, and of every other


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("term", ["causal", "all", "packed"])
@pytest.mark.watched
def test_opcheck(term, impl, device):
    from fastpeft.ops import attention_custom

    tensors, terms, do = draw(**TERMS[term], d=16, device=device)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    q = leaves["q"]
    tensors_of_call = [leaves.get(name) for name in ("q", "k", "v", "bias", "table", "sinks")]
    names = ("alibi_slopes", "key_padding_mask", "cu_seqlens_q", "cu_seqlens_k", "cos", "sin")
    tensors_of_call += [terms.get(name) for name in names]
    relative = terms.get("relative", {"bidirectional": True, "max_distance": 0})
    numbers = (0.25, None, 0 if terms["causal"] else None, terms["softcap"], *relative.values(), 20000, impl)
    seed = torch.tensor(7)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if impl == "torch":  # traces a second time, which costs the interpreter seconds and shows nothing new
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(attention_custom.attention, (*tensors_of_call, seed, *numbers), test_utils=tests)
    plain = [None if x is None else x.detach() for x in tensors_of_call]
    o, lse = attention_custom.attention(*plain, seed, *numbers)
    for needs in ([x is not None for x in plain[:6]], [False, True, False, False, False, False]):
        backward = (do, *plain[:3], o, lse, *plain[3:], seed, *numbers, needs)
        torch.library.opcheck(
            attention_custom.attention_backward, backward, test_utils=("test_schema", "test_faketensor")
        )
    assert o.shape == q.shape


@pytest.mark.parametrize("term", ["causal", "bias of heads"])
def test_compiled_dropout_draws_a_new_mask_per_call_and_the_same_in_backward(term):
    tensors, terms, do = draw(**TERMS[term], sq=24, sk=24)
    function = compiled("torch", dropout_p=0.5)
    torch.manual_seed(3)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    o = function(leaves, terms)
    torch.manual_seed(3)
    assert_bits_equal("same seed", function(leaves, terms), o)
    assert not torch.equal(function(leaves, terms), o)
    torch.manual_seed(3)
    expected, eager = run(tensors, terms, "torch", dropout_p=0.5)
    assert_close("eager's mask", o, expected, OTHER_ORDER_OF_SUMS)
    grads = torch.autograd.grad(o, list(leaves.values()), do)
    for name, got, want in zip(leaves, grads, torch.autograd.grad(expected, eager, do), strict=True):
        assert_close(f"d{name}", got, want, OTHER_ORDER_OF_SUMS)
    given = compiled("torch", dropout_p=0.5, seed=11)(leaves, terms)
    assert_close("a given seed", given, run(tensors, terms, "torch", dropout_p=0.5, seed=11)[0], OTHER_ORDER_OF_SUMS)


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that anything under it returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return results


LINEAR = [name for name in TERMS if name not in ("bias", "bias of heads", "all")]  # whose inputs are


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("term", [*LINEAR, "dropout"])
def test_tracing_on_fake_tensors_is_linear_in_the_length(term, impl):
    """1 x 4096: shapes come back, what is kept for backward is o and lse, and nothing is larger than q."""
    tokens, heads, d = 4096, 4, 32
    options = {"causal": True} if term == "dropout" else TERMS[term]
    if term == "packed":
        options = options | {"packed": [(1000, 1000), (3096, 3096)]}
    saved = []

    def pack(x):
        saved.append(x.untyped_storage())
        return x

    with FakeTensorMode(), Allocations() as watch:
        tensors, terms, do = draw(**{"batch": 1, "sq": tokens, "sk": tokens, "d": d} | options)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            o, leaves = run(tensors, terms, impl, dropout_p=0.25 if term == "dropout" else 0.0)
        grads = torch.autograd.grad(o, leaves, do)
    assert o.shape == tensors["q"].shape
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    inputs = {x.untyped_storage()._cdata for x in (*tensors.values(), *leaves)}
    kept = {storage._cdata: storage.nbytes() for storage in saved if storage._cdata not in inputs}
    size = torch.finfo(options.get("dtype", torch.float32)).bits // 8
    assert sum(kept.values()) <= tokens * heads * (d * size + 4) + tokens * 32  # and the small terms themselves
    assert watch.largest <= tokens * heads * d * 4


@pytest.mark.parametrize("term", TERMS)
def test_meta_tensors_give_shapes(term):
    tensors, terms, do = draw(**TERMS[term], device="meta") if "padding" not in TERMS[term] else on_meta(term)
    o, leaves = run(tensors, terms, "auto", dropout_p=0.25)
    grads = torch.autograd.grad(o, leaves, do)
    assert all(x.is_meta for x in (o, *grads))
    assert [g.shape for g in grads] == [x.shape for x in leaves]


def on_meta(term):
    """Padding is drawn by assignments to its elements, which meta tensors do not have."""
    tensors, terms, do = draw(**TERMS[term])
    terms = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in terms.items()}
    return {name: x.to("meta") for name, x in tensors.items()}, terms, do.to("meta")


@pytest.mark.parametrize(("reentrant", "traced"), [(False, False), (True, False), (False, True)])
def test_checkpointing_draws_the_same_mask(reentrant, traced):
    """A compiled checkpoint asked the operator that draws a seed for the device of its arguments, of which it had none."""
    tensors, _, do = draw(causal=True, sq=17, sk=17)
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v")]

    def call(q, k, v):
        return attention(q, k, v, causal=True, dropout_p=0.5, impl="torch")

    def again(q, k, v):
        return checkpoint(call, q, k, v, use_reentrant=reentrant)

    torch.compiler.reset()
    function = torch.compile(again, backend="aot_eager") if traced else again
    torch.manual_seed(5)
    plain = torch.autograd.grad(call(*leaves), leaves, do)
    torch.manual_seed(5)
    function(*leaves).backward(do)
    for leaf, want in zip(leaves, plain, strict=True):
        assert_close("gradient", leaf.grad, want, OTHER_ORDER_OF_SUMS)


def test_a_second_differentiation_of_the_operator_is_refused():
    tensors, terms, _ = draw(softcap=2.0)
    from fastpeft.ops import attention_custom

    q, k, v = (tensors[name].requires_grad_() for name in ("q", "k", "v"))
    o, _ = attention_custom.attention(q, k, v, *[None] * 10, 0.25, None, None, terms["softcap"], True, 0, 0, "torch")
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        dq.sum().backward()
