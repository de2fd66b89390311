"""BottleneckAdapter against the equations in plain float64 code; several at once, rows, tuples, half precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.layers.bottleneck import NON_LINEARITIES, BottleneckAdapter, BottleneckSettings
from tests.saved_bytes import SavedBytes
from tests.tolerance import GRADCHECK, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, assert_no_worse

K, R, N = 33, 5, 17
BASES = {"linear": lambda: nn.Linear(K, N), "conv1d": lambda: Conv1D(N, K)}


class Block(nn.Module):
    """A module with a residual argument, like BertOutput; or with more than one output."""

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.dense, self.norm, self.outputs = nn.Linear(K, N), nn.LayerNorm(N), outputs

    def forward(self, hidden_states, input_tensor):
        y = self.norm(self.dense(hidden_states) + input_tensor)
        return y if self.outputs == 1 else (y, hidden_states)


def fill(layer: BottleneckAdapter) -> BottleneckAdapter:
    for name in layer.adapter_names:
        for tensor in layer.adapter_tensors(name).values():
            nn.init.normal_(tensor, std=0.4)
    return layer


def adapter(base, names=("one",), *, dtype=torch.float64, reads=N, layer_norm=False, **settings) -> BottleneckAdapter:
    layer = BottleneckAdapter(base.to(dtype))
    for name in names:
        layer.add_bottleneck(name, (reads, R, N), BottleneckSettings(**settings), layer_norm=layer_norm)
    fill(layer).set_adapter(list(names))
    return layer.eval()


def plain(layer, name, v):
    """s f(v) by the equation."""
    tensors = {key: tensor.detach() for key, tensor in layer.adapter_tensors(name).items()}
    settings = layer.adapter_settings[name]
    if "adapter_norm.weight" in tensors:
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        v = v * tensors["adapter_norm.weight"] + tensors["adapter_norm.bias"]
    z = v @ tensors["adapter_down.weight"].T + tensors["adapter_down.bias"]
    act = {
        "relu": lambda z: z.clamp(min=0),
        "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "gelu_new": lambda z: z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "swish": lambda z: z / (1 + torch.exp(-z)),
        "tanh": torch.tanh,
        "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
        "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
        "linear": lambda z: z,
    }[settings.non_linearity]
    return settings.scaling * (act(z) @ tensors["adapter_up.weight"].T + tensors["adapter_up.bias"])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("non_linearity", NON_LINEARITIES)
def test_after(non_linearity, layer_norm, base):
    layer = adapter(BASES[base](), non_linearity=non_linearity, layer_norm=layer_norm, scaling=0.7)
    x = torch.randn(2, 3, K, dtype=torch.float64)
    h = layer.base_layer(x)
    assert_close("y", layer(x), h + plain(layer, "one", h), OTHER_ORDER_OF_SUMS)


def test_beside_residual_and_without_the_skip():
    x, r = torch.randn(2, 3, K, dtype=torch.float64), torch.randn(2, 3, N, dtype=torch.float64)
    beside = adapter(nn.Linear(K, N), position="beside", reads=K, scaling=4.0)
    assert_close("beside", beside(x), beside.base_layer(x) + plain(beside, "one", x), OTHER_ORDER_OF_SUMS)
    residual = adapter(Block(), position="residual")
    expected = residual.base_layer(x, r + plain(residual, "one", r))
    assert_close("residual", residual(x, r), expected, OTHER_ORDER_OF_SUMS)
    assert_bits_equal("by name", residual(input_tensor=r, hidden_states=x), residual(x, r))
    alone = adapter(nn.Linear(K, N), residual=False)
    assert_close("alone", alone(x), plain(alone, "one", alone.base_layer(x)), OTHER_ORDER_OF_SUMS)


def test_several_are_stacked_after_and_summed_beside():
    x = torch.randn(4, K, dtype=torch.float64)
    after = adapter(nn.Linear(K, N), ("one", "two"))
    h = after.base_layer(x)
    first = h + plain(after, "one", h)
    assert_close("stacked", after(x), first + plain(after, "two", first), OTHER_ORDER_OF_SUMS)
    after.set_adapter(["two", "one"])
    first = h + plain(after, "two", h)
    assert_close("the other order", after(x), first + plain(after, "one", first), OTHER_ORDER_OF_SUMS)

    both = adapter(nn.Linear(K, N), ("one", "two"), position="beside", reads=K)
    third = adapter(both.base_layer, ("three",))
    both.absorb(third)
    both.set_adapter(["three", "one", "two"])
    summed = both.base_layer(x) + plain(both, "one", x) + plain(both, "two", x)
    assert_close("beside first", both(x), summed + plain(both, "three", summed), OTHER_ORDER_OF_SUMS)


def fusion(base, members, position="after", reads=N) -> BottleneckAdapter:
    layer = adapter(base, members, position=position, reads=reads, dropout=0.5)
    layer.add_fusion("mix", [*members, "not here"], N)
    fill(layer).set_adapter("mix")
    return layer


def plain_mix(layer, members, v, query):
    """V sum_n p_n d_n, one adapter at a time, with the keys written out."""
    t = {key: tensor.detach() for key, tensor in layer.adapter_tensors("mix").items()}
    d = [plain(layer, name, v) for name in members]
    q = query @ t["fusion_query.weight"].T + t["fusion_query.bias"]
    scores = torch.stack([(q * (one @ t["fusion_key.weight"].T)).sum(-1) for one in d]).exp()
    p = scores / scores.sum(0)
    return sum(weight[..., None] * (one @ t["fusion_value.weight"].T) for weight, one in zip(p, d, strict=True))


@pytest.mark.parametrize("members", [("a", "b"), ("a",), ("a", "b", "c")], ids=len)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_fusion(members, training):
    """In training too: the fused adapters' dropout is left out."""
    x, r = torch.randn(2, 3, K, dtype=torch.float64), torch.randn(2, 3, N, dtype=torch.float64)
    after = fusion(nn.Linear(K, N), members).train(training)
    h = after.base_layer(x)
    assert_close("after", after(x), h + plain_mix(after, members, h, h), OTHER_ORDER_OF_SUMS)
    beside = fusion(nn.Linear(K, N), members, "beside", K).train(training)
    h = beside.base_layer(x)
    assert_close("beside", beside(x), h + plain_mix(beside, members, x, h), OTHER_ORDER_OF_SUMS)
    residual = fusion(Block(), members, "residual").train(training)
    expected = residual.base_layer(x, r + plain_mix(residual, members, r, r))
    assert_close("residual", residual(x, r), expected, OTHER_ORDER_OF_SUMS)


def test_a_new_fusion_is_near_the_mean_and_trains_alone():
    layer = adapter(nn.Linear(K, N), ("a", "b"))
    layer.add_fusion("mix", ["a", "b"], N)
    layer.fusion_key["mix"].weight.data.zero_()
    layer.set_adapter("mix")
    x = torch.randn(4, K, dtype=torch.float64)
    h = layer.base_layer(x)
    mean = (plain(layer, "a", h) + plain(layer, "b", h)) / 2
    assert_close("mean", layer(x), h + mean, OTHER_ORDER_OF_SUMS)
    trained = {key for key, parameter in layer.named_parameters() if parameter.requires_grad and "base" not in key}
    assert {key.partition(".")[0] for key in trained} == {"fusion_query", "fusion_key", "fusion_value"}
    with pytest.raises(ValueError, match=r"fusion 'mix' without another.*\['mix', 'a'\]"):
        layer.set_adapter(["mix", "a"])


@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "norm"])
def test_gradients(layer_norm):
    layer = adapter(nn.Linear(K, N), ("a", "b"), non_linearity="gelu", layer_norm=layer_norm)
    layer.add_fusion("mix", ["a", "b"], N)
    fill(layer)
    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    for name in ("a", "mix"):
        layer.set_adapter(name)
        own = layer.adapter_tensors(name)

        def run(x, *values, layer=layer, own=own):
            keys = [key for key, p in layer.named_parameters() if any(p is tensor for tensor in own.values())]
            return torch.func.functional_call(layer, dict(zip(keys, values, strict=True)), (x,))

        in_order = [p for p in layer.parameters() if any(p is tensor for tensor in own.values())]
        assert torch.autograd.gradcheck(run, (x, *in_order), **GRADCHECK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_base(dtype):
    """Adapters in float32, y in the base's dtype and no worse than eager code in it; x and z are all that is kept."""
    layer = adapter(nn.Linear(K, N), dtype=dtype)
    assert {tensor.dtype for tensor in layer.adapter_tensors("one").values()} == {torch.float32}
    x = torch.randn(65, K).to(dtype)
    h = layer.base_layer(x).detach()
    eager, wide = copy.deepcopy(layer), copy.deepcopy(layer)
    for tensor in eager.adapter_tensors("one").values():
        tensor.data = tensor.data.to(dtype)
    for tensor in wide.adapter_tensors("one").values():
        tensor.data = tensor.data.double()
    exact = h.double() + plain(wide, "one", h.double())
    got = layer(x).detach()
    assert_no_worse("y", got, exact, h + plain(eager, "one", h))

    layer.base_layer.requires_grad_(False)
    x.requires_grad_()
    with SavedBytes([*layer.parameters(), x]) as saved:
        y = layer(x)
    assert y.requires_grad
    assert saved.total() == 65 * (2 * N + 4 * R), "h in its own dtype, and one z in float32"


def test_dropout_acts_in_training_only():
    layer = adapter(nn.Linear(K, N), dropout=0.5)
    x = torch.randn(50, K, dtype=torch.float64)
    h = layer.base_layer(x)
    assert_close("eval", layer(x), h + plain(layer, "one", h), OTHER_ORDER_OF_SUMS)
    layer.train()
    torch.manual_seed(0)
    got = layer(x)
    torch.manual_seed(0)
    assert_close("train", got, h + plain(layer, "one", F.dropout(h, 0.5)), OTHER_ORDER_OF_SUMS)


def test_rows_name_their_adapters_also_with_a_residual_argument():
    x, r = torch.randn(4, 3, K, dtype=torch.float64), torch.randn(4, 3, N, dtype=torch.float64)
    after = fusion(nn.Linear(K, N), ("a", "b"))
    residual = adapter(Block(outputs=2), ("a", "b"), position="residual")
    for layer, names, args in (
        (after, ["mix", "__base__", "b", "mix"], (x,)),
        (residual, ["a", "b", "__base__", "a"], (x, r)),
    ):
        expected = []
        for i, name in enumerate(names):
            layer.set_adapter([] if name == "__base__" else name)
            output = layer(*(arg[i : i + 1] for arg in args))
            expected.append(output[0] if isinstance(output, tuple) else output)
        layer.row_adapters = names
        output = layer(*args)
        assert_close("y", output[0] if isinstance(output, tuple) else output, torch.cat(expected), OTHER_ORDER_OF_SUMS)
        with pytest.raises(ValueError, match="one name for each of 3 items, got 4"):
            layer(*(arg[:3] for arg in args))


def test_tuples_keep_their_other_items_and_other_outputs_are_refused():
    x, r = torch.randn(2, K, dtype=torch.float64), torch.randn(2, N, dtype=torch.float64)
    layer = adapter(Block(outputs=2))
    h, _ = layer.base_layer(x, r)
    y, other = layer(x, r)
    assert other is x
    assert_close("y", y, h + plain(layer, "one", h), OTHER_ORDER_OF_SUMS)

    class Names(Block):
        def forward(self, hidden_states):
            return {"y": self.dense(hidden_states)}

    with pytest.raises(TypeError, match=r"expected Names to give a tensor or a tuple.*got dict"):
        adapter(Names())(x)


def test_off_and_none_active_are_the_base_s_bits():
    layer = adapter(nn.Linear(K, N), dtype=torch.float32)
    x = torch.randn(5, K)
    expected = layer.base_layer(x)
    layer.enable_adapters(False)
    assert_bits_equal("off", layer(x), expected)
    layer.enable_adapters(True)
    layer.set_adapter([])
    assert_bits_equal("none", layer(x), expected)


def test_init():
    base = nn.Linear(64, 64)
    for init, spread in ((True, None), ("houlsby", 1e-2), (False, None)):
        layer = BottleneckAdapter(base)
        layer.add_bottleneck("one", (64, 32, 64), BottleneckSettings(), init_weights=init)
        layer.set_adapter("one")
        x = torch.randn(5, 64)
        change = (layer(x) - base(x)).abs().max()
        assert (change == 0) == (init is True)
        if spread:
            for linear in (layer.adapter_down["one"], layer.adapter_up["one"]):
                assert linear.weight.abs().max() <= 2 * spread
                assert linear.weight.std() > spread / 2
                assert not linear.bias.any()


def test_a_width_that_does_not_fit_is_named():
    layer = adapter(nn.Linear(K, N), reads=N + 1)
    with pytest.raises(ValueError, match=rf"K={N + 1}.*\(2, {N}\)"):
        layer(torch.zeros(2, K, dtype=torch.float64))
