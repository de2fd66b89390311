"""LoRALinear and LoRAEmbedding against the formula written out, with one adapter and with several."""

import copy
import math
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.layers.lora import LoRAEmbedding, LoRALinear
from tests.saved_bytes import SavedBytes
from tests.tolerance import MEAN_OF_DRAWS_SIGMAS, SPREAD_OF_INIT, VARIANCE_OF_DRAWS, assert_bits_equal, assert_no_worse

F32, BF16 = torch.float32, torch.bfloat16
K, N, R = 40, 24, 3


class Subclassed(nn.Linear):
    """A linear whose forward does more than its weight and bias say."""

    def forward(self, x):
        return super().forward(x) * 2 + 1


def make_base(kind: str) -> nn.Module:
    if kind == "conv1d":
        return Conv1D(N, K)
    if kind == "subclass":
        return Subclassed(K, N)
    base = nn.Linear(K, N, bias=kind != "no_bias")
    if kind == "forward_hook":
        base.register_forward_hook(lambda module, args, output: output * 2 + 1)
    if kind == "pre_hook":
        base.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    if kind == "own_forward":
        base.forward = lambda x, plain=base.forward: plain(x) * 2 + 1
    return base


KINDS = ["linear", "no_bias", "conv1d", "subclass", "forward_hook", "pre_hook", "own_forward"]


def fill(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)


def make(kind: str = "linear", dtype=F32, names=("default",), **options) -> LoRALinear:
    """A layer with random values in base and adapters; ranks 3, 4, ... and scales that differ by adapter."""
    base = make_base(kind).to(dtype)
    layer = None
    for i, name in enumerate(names):
        added = LoRALinear(base, R + i, lora_alpha=2 * R + i, adapter_name=name, **options)
        if layer is None:
            layer = added
        else:
            layer.absorb(added)
    fill(layer)
    layer.set_adapter(names)
    return layer


def formula(layer: LoRALinear, x, names, dtype):
    """base(x) + sum of s (B (A x) + lora_bias) in `dtype`, from copies of the layer's own tensors."""
    wide = copy.deepcopy(layer).to(dtype)
    if "forward" in vars(layer.base_layer):  # an instance's own forward does not survive a copy
        wide.base_layer = nn.Linear(K, N).to(dtype)
        wide.base_layer.load_state_dict(layer.base_layer.state_dict())
        wide.base_layer.register_forward_hook(lambda module, args, output: output * 2 + 1)
    y = wide.base_layer(x.to(dtype))
    for name in names:
        a, b = wide.lora_A[name], wide.lora_B[name]
        y = y + F.linear(F.linear(x.to(dtype), a.weight), b.weight, b.bias) * layer.scaling[name]
    return y


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["one", "two", "three"]], ids=["1", "2", "3"])
@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_formula(kind, lora_bias, names):
    layer = make(kind, names=names, lora_bias=lora_bias)
    for shape in ((33, K), (2, 3, K), (K,)):
        x = torch.randn(shape)
        with torch.no_grad():
            y, exact, eager = layer(x), formula(layer, x, names, torch.float64), formula(layer, x, names, F32)
        assert_no_worse(f"y of {shape}", y, exact, eager)


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["1", "2"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "forward_hook"])
def test_every_gradient_is_the_formula_s(kind, names):
    layer, x = make(kind, names=names, lora_bias=True), torch.randn(33, K, requires_grad=True)
    wide = copy.deepcopy(layer).double()
    parameters = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert len(parameters) == 3 * len(names)
    y = layer(x)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *map(layer.get_parameter, parameters)], dy)

    def expected(layer, x, dtype):
        y = layer.base_layer(x)
        for name in names:
            a, b = layer.lora_A[name], layer.lora_B[name]
            y = y + b(a(x)) * layer.scaling[name]
        return torch.autograd.grad(y, [x, *map(layer.get_parameter, parameters)], dy.to(dtype))

    exact = expected(wide, x.detach().double().requires_grad_(True), torch.float64)
    eager = expected(layer, x, F32)
    for name, *tensors in zip(["x", *parameters], got, exact, eager):
        assert_no_worse(f"d{name}", *tensors)


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["1", "2"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "forward_hook"])
def test_dropout_has_the_right_mean_and_a_mask_per_adapter(kind, names):
    """Averaged over many draws the output is that without dropout; one draw differs; two adapters do not share a mask."""
    layer, p = make(kind, names=names, lora_dropout=0.25), 0.25
    x = torch.randn(1, K)
    with torch.no_grad():
        layer.eval()
        without = layer(x)
        assert_bits_equal("eval has no dropout", layer(x), without)
        layer.train()
        draws = torch.cat([layer(x.expand(33, K)) for _ in range(200)])
    assert not torch.equal(draws[0], draws[1])
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - without).abs() < MEAN_OF_DRAWS_SIGMAS * deviation).all())
    # Independent masks: the variances of the adapters add up.
    variance = sum(_dropout_variance(layer, x, name, p) for name in names)
    assert bool((draws.var(0) / variance - 1).abs().max() < VARIANCE_OF_DRAWS)


def _dropout_variance(layer, x, name, p):
    """Variance over masks of s B A drop(x): sum over k of (s (B A)_nk x_k)^2 p / (1 - p)."""
    product = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
    return (product * x).square().sum(1).detach() * p / (1 - p)


def test_second_adapter_s_dropout_follows_torch_manual_seed():
    layer, x = make(names=["one", "two"], lora_dropout=0.5), torch.randn(33, K)
    torch.manual_seed(4)
    first = layer(x)
    torch.manual_seed(4)
    assert_bits_equal("same seed", layer(x), first)


def test_settings_of_one_adapter():
    base = nn.Linear(K, N, dtype=BF16)
    layer = LoRALinear(base, r=16, lora_alpha=8, use_rslora=True, lora_bias=True)
    assert layer.scaling == {"default": 2.0}  # 8 / sqrt(16)
    assert layer.lora_A["default"].weight.shape == (16, K)
    assert layer.lora_B["default"].weight.shape == (N, 16)
    assert {p.dtype for p in layer.adapter_tensors("default").values()} == {F32}
    assert (layer.in_features, layer.out_features, layer.weight) == (K, N, base.weight)
    same = LoRALinear(base, autocast_adapter_dtype=False)
    assert {p.dtype for p in same.adapter_tensors("default").values()} == {BF16}
    assert LoRALinear(base, r=4, lora_alpha=8).scaling == {"default": 2.0}
    assert list(layer.adapter_tensors("default")) == ["lora_A.weight", "lora_B.weight", "lora_B.bias"]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_new_adapter_changes_nothing(init, kind):
    base, x = make_base(kind), torch.randn(33, K)
    expected = base(x)
    layer = LoRALinear(base, lora_bias=True, init_lora_weights=init)
    assert_bits_equal("y", layer(x), expected)
    assert bool(layer.lora_A["default"].weight.any())


def test_initial_values_have_the_documented_spread():
    base = nn.Linear(2048, N)
    a = LoRALinear(base, 64, init_lora_weights=True).lora_A["default"].weight
    bound = 1 / math.sqrt(2048)  # Kaiming-uniform with a = sqrt(5)
    assert 0.99 * bound < a.abs().max() <= bound
    a = LoRALinear(base, 64, init_lora_weights="gaussian").lora_A["default"].weight
    assert abs(a.std().item() * 64 - 1) < SPREAD_OF_INIT
    both = LoRALinear(base, 64, init_lora_weights=False)
    assert bool(both.lora_A["default"].weight.any())
    assert bool(both.lora_B["default"].weight.any())


def test_initial_values_are_peft_s():
    """The same torch seed gives the same A as peft, so that runs can be compared."""
    torch.manual_seed(5)
    ours = LoRALinear(nn.Linear(K, N), 8).lora_A["default"].weight
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(K, N))
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["0"])).base_model.model[0].lora_A
    assert_bits_equal("A", ours, theirs["default"].weight)


def test_bfloat16_base_is_close_to_peft_and_keeps_half_as_much():
    """PEFT copies x to float32 for its float32 adapters and keeps the copy; S here has R columns in x's dtype."""
    m, k, n = 128, 512, 512
    base = nn.Linear(k, n, dtype=BF16)
    ours = LoRALinear(base, 8, 16)
    fill(ours)
    theirs = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    layer.load_state_dict(ours.state_dict())
    x = torch.randn(m, k, dtype=BF16)
    outputs, kept = [], []
    for module in (ours, layer):
        x_in = (x + 0).requires_grad_(True)
        with SavedBytes(module) as saved:
            outputs.append(module(x_in))
        kept.append(saved.total())
    with torch.no_grad():
        exact = formula(ours, x, ["default"], torch.float64)
    assert_no_worse("y", outputs[0].detach(), exact, outputs[1].detach())
    assert kept[0] == x.nbytes + m * 8 * 2
    assert kept[0] <= kept[1] / 2 + m * 8 * 2


@pytest.mark.parametrize(
    ("r", "options", "said"),
    [
        (0, {}, "r=0"),
        (-1, {}, "r=-1"),
        (2.0, {}, "r=2.0"),
        (True, {}, "r=True"),
        (2, {"lora_dropout": 1.0}, "got 1.0"),
        (2, {"lora_dropout": -0.5}, "got -0.5"),
        (2, {"lora_alpha": float("nan")}, "got nan"),
        (2, {"adapter_name": "a.b"}, "'a.b'"),
        (2, {"adapter_name": ""}, "''"),
        (3, {"init_lora_weights": "orthogonal"}, "even rank"),
    ],
    ids=str,
)
def test_bad_options_are_named(r, options, said):
    with pytest.raises(ValueError, match=said):
        LoRALinear(nn.Linear(K, N), r, **options)


def test_bad_base_modules_are_named():
    with pytest.raises(TypeError, match=r"expected an nn.Linear or transformers Conv1D, got Embedding"):
        LoRALinear(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match=r"expected an nn.Embedding, got Linear"):
        LoRAEmbedding(nn.Linear(4, 4))


def test_a_named_implementation_is_used():
    layer, x = LoRALinear(nn.Linear(K, N), R, impl="nonsense"), torch.randn(33, K)
    with pytest.raises(ValueError, match="nonsense"):
        layer(x)
    layer.impl = "reference"
    assert layer(x).grad_fn.name() != "LoRALinearBackward"


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_are_independent(duplicate):
    layer, x = make(names=["one", "two"]), torch.randn(33, K)
    layer.merge(["one"])
    twin = duplicate(layer)
    assert_bits_equal("y", twin(x), layer(x))
    twin.unmerge()
    assert twin.get_base_layer() is not layer.get_base_layer()
    fill(twin)
    layer.unmerge()
    with torch.no_grad():
        assert not torch.equal(twin(x), layer(x))


# -- embeddings ---------------------------------------------------------------------------------------------------------

V, D = 29, 12
IDS = torch.tensor([[0, 3, 28], [3, 3, 7]])


class Scaled(nn.Embedding):
    """As in Gemma 3: the rows are multiplied after the look-up."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(5.0))

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["1", "2"])
@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_embedding_is_a_look_up_in_the_sum(kind, names):
    base = kind(V, D)
    layer = LoRAEmbedding(base, R, 2 * R, adapter_name=names[0])
    for i, name in enumerate(names[1:], 1):
        layer.absorb(LoRAEmbedding(base, R + i, 2 * R + i, adapter_name=name, use_rslora=True))
    fill(layer)
    layer.set_adapter(names)

    def table(dtype):
        deltas = [layer.lora_embedding_B[n].to(dtype) @ layer.lora_embedding_A[n].to(dtype) for n in names]
        total = base.weight.to(dtype) + sum(d.t() * layer.scaling[n] for n, d in zip(names, deltas))
        return total[IDS] * (5 if kind is Scaled else 1)

    with torch.no_grad():
        exact, eager = table(torch.float64), table(F32)
        assert_no_worse("y", layer(IDS), exact, eager)
        layer.merge()
        assert_no_worse("merged", layer(IDS), exact, eager)


def test_embedding_trains_and_keeps_the_padding_row():
    base = nn.Embedding(V, D, padding_idx=3)
    layer = LoRAEmbedding(base, R)
    fill(layer)
    layer(IDS).sum().backward()
    a = layer.lora_embedding_A["default"].grad
    assert bool(a[:, [0, 7, 28]].any(0).all())
    assert not a[:, 3].any()
    assert bool(layer.lora_embedding_B["default"].grad.any())
    assert base.weight.grad is None


def test_a_new_embedding_adapter_changes_nothing():
    base = nn.Embedding(V, D, dtype=BF16)
    layer = LoRAEmbedding(base, R)
    assert_bits_equal("y", layer(IDS), base(IDS))
    assert {p.dtype for p in layer.adapter_tensors("default").values()} == {F32}
    assert list(layer.adapter_tensors("default")) == ["lora_embedding_A", "lora_embedding_B"]
    assert (layer.num_embeddings, layer.embedding_dim) == (V, D)
