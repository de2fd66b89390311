"""accelerate's part "mlp": gated MLPs compute what they did, by one op or by glu between their own linears."""

import copy

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LoraConfig
from fastpeft.integrations.acceleration import apply
from fastpeft.integrations.acceleration import mlp as part
from fastpeft.layers import shared_input
from fastpeft.ops import lora_mlp
from tests import tiny_models
from tests.integrations.mlp_cases import FAMILIES, adapted, assert_same, mlps, one_op_calls, step
from tests.saved_bytes import SavedBytes
from tests.tolerance import (
    OTHER_ORDER_OF_SUMS,
    assert_bits_equal,
    assert_close,
    assert_no_worse,
)

BF16 = torch.bfloat16
MLPS = {"t5": 4}


@pytest.fixture
def calls(monkeypatch):
    return one_op_calls(monkeypatch)


@pytest.fixture
def no_checkpointing(monkeypatch):
    """A model whose layers cannot be checkpointed: "memory" is then the MLP's own."""
    monkeypatch.setattr(apply, "checkpoint_layers", lambda ledger, core: False)


@pytest.mark.parametrize("memory", lora_mlp.MEMORY)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_adapters(family, memory, calls, no_checkpointing):
    model = adapted(family)
    if family == "t5":
        model.eval()  # its dropout between h and wo
    want = step(model)
    ledger = fastpeft.accelerate(model, parts=["mlp"], memory=memory)
    found = mlps(model)
    assert len(ledger.slots) == len(found) == MLPS.get(family, 2)
    assert all(isinstance(module, part.FastGatedMLP) for module in found)
    assert_same(step(model), want)
    assert len(calls) == (0 if family == "phi3" else len(found))
    assert all(options["memory"] == memory for options in calls)
    assert not ledger.fallbacks
    assert f"{len(found)} of {len(found)} replaced" in ledger.summary()
    fastpeft.restore(model)
    assert [type(module).__mro__[1] for module in mlps(model)] == [nn.Module] * len(found)
    assert not any(name.startswith("_fastpeft") for module in mlps(model) for name in module.__dict__)
    for name, value in step(model).items():
        assert_bits_equal(name, value, want[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_gradients_the_bits_are_the_models_own(family):
    model = adapted(family).eval()
    want = tiny_models.logits(model)
    fastpeft.accelerate(model, parts=["mlp"])
    if family in ("gemma2", "gemma3", "t5"):  # gelu over a strided half, or written out in other steps
        assert_close("logits", tiny_models.logits(model), want, OTHER_ORDER_OF_SUMS)
    else:
        assert_bits_equal("logits", tiny_models.logits(model), want)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "t5"])
@pytest.mark.parametrize("how", ["peft", "bare"])
def test_other_ways_to_train(how, family, calls):
    """PEFT's own layers run their own forwards around glu; in a bare model the weights train."""
    model = adapted(family, how)
    want = step(model)
    ledger = fastpeft.accelerate(model, parts=["mlp"])
    assert_same(step(model), want)
    assert not ledger.fallbacks
    if how == "bare":
        assert not calls


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_a_frozen_mlp_between_trained_attentions_is_one_op(family, calls):
    """The usual LoRA on q and v alone: nothing of the MLP trains, and its gradient goes through."""
    targets = ["q", "v"] if family == "t5" else ["q_proj", "v_proj"]
    model = adapted(family, target_modules=targets)
    model = model.eval() if family == "t5" else model
    want = step(model)
    fastpeft.accelerate(model, parts=["mlp"])
    assert_same(step(model), want)
    # the first layer's input needs no gradient in front of q and v, but its MLP's does
    assert len(calls) == len(mlps(model))


def test_a_frozen_4_bit_mlp_is_one_op_and_restored(calls):
    """QLoRA on q and v: reading the MLP's Linear4bits turns bitsandbytes' repacking off, until restore."""
    torch.manual_seed(1)
    model = tiny_models.llama(hidden_size=64, intermediate_size=128)
    fastpeft.quantize(model, compute_dtype=torch.float32)
    model = fastpeft.get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    tiny_models.fill(model)
    linears = [module for mlp in mlps(model) for module in mlp.children() if hasattr(module, "quant_state")]
    assert len(linears) == 9
    before = [dict(linear.__dict__) for linear in linears]
    want = step(model)
    fastpeft.accelerate(model, parts=["mlp"])
    assert_same(step(model), want)
    assert len(calls) == 3
    fastpeft.restore(model)
    for linear, held in zip(linears, before):
        assert set(linear.__dict__) == set(held)
        assert linear.support_avx512bf16_for_cpu == held["support_avx512bf16_for_cpu"]


def test_the_linears_are_not_called_and_no_result_waits(calls):
    """gate_proj leads up_proj where they are called; a fused MLP must leave no result of the group behind."""
    model = adapted("llama")
    assert shared_input.link_siblings(model)
    want = step(model)
    fastpeft.accelerate(model, parts=["mlp"])
    seen = []
    for module in mlps(model):
        module.gate_proj.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert_same(step(model), want)
    assert len(calls) == 2
    current = shared_input._state.input
    assert current is None or not current.waiting
    gate = mlps(model)[0].gate_proj
    assert gate.followers.modules == [mlps(model)[0].up_proj]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_of_adapters_has_the_same_masks(dropout, calls):
    model = adapted("llama", lora_dropout=dropout)
    want = step(model)
    fastpeft.accelerate(model, parts=["mlp"])
    assert_same(step(model), want)
    assert len(calls) == 2


def test_t5_drops_h_between_its_own_linears(calls):
    model = adapted("t5")
    want = step(model)
    ledger = fastpeft.accelerate(model, parts=["mlp"])
    assert_same(step(model), want)
    assert not calls
    assert not ledger.fallbacks


def test_t5_casts_h_where_wo_stays_in_float32(calls):
    """ACT2FN's gelu_new rounds every step to bfloat16; one rounding is nearer to float64."""
    model = adapted("t5", "bare").to(BF16).requires_grad_(False).eval()
    module = mlps(model)[0]
    module.wo.float()
    x = torch.randn(3, 32, dtype=BF16, requires_grad=True)
    want = copy.deepcopy(module).double()(x.double())
    eager = module(x)
    fastpeft.accelerate(model, parts=["mlp"])
    got = module(x)
    assert got.dtype == eager.dtype == torch.float32
    assert_no_worse("y", got, want, eager)
    dx = (torch.autograd.grad(y.sum(), x)[0] for y in (got, want, eager))
    got, want, eager = dx
    assert_no_worse("dx", got, want.double(), eager)
    assert not calls


def test_float32_adapters_over_bfloat16(calls):
    torch.manual_seed(1)
    model = fastpeft.get_peft_model(
        FAMILIES["llama"]().to(BF16), LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    ).train()
    tiny_models.fill(model)
    exact = copy.deepcopy(model).double()
    want, eager = step(exact), step(model)
    fastpeft.accelerate(model, parts=["mlp"])
    got = step(model)
    assert len(calls) == 2
    for name, value in want.items():
        assert_no_worse(name, got[name], value, eager[name])


def test_autocast(calls):
    model, other = adapted("llama"), adapted("llama", "peft")
    module = mlps(model)[0]
    x = torch.randn(5, 32, requires_grad=True)
    want = copy.deepcopy(module).double()(x.double())
    fastpeft.accelerate(model, parts=["mlp"])
    with torch.autocast("cpu", dtype=BF16):
        eager, got = mlps(other)[0](x), module(x)
    assert len(calls) == 1
    assert_no_worse("y", got, want, eager)
    got, want, eager = (torch.autograd.grad(y.sum(), x)[0] for y in (got, want, eager))
    assert_no_worse("dx", got, want.double(), eager)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, calls):
    model = adapted("llama", lora_dropout=0.3)
    model.enable_input_require_grads()
    want = step(model)
    fastpeft.accelerate(model, parts=["mlp"])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model), want)
    assert len(calls) == (2 if reentrant else 4)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["accelerate", "users", "users_reentrant"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_checkpointed_layers_keep_least_where_the_mlp_ends_them(family, reentrant, calls):
    """Elsewhere, as before Gemma 2's last norm, "memory" would compute gate and up a third time."""
    model = adapted(family)
    want = step(model)
    fastpeft.accelerate(model, parts=["mlp"], memory="memory" if reentrant is None else "balanced")
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model), want)
    least = family in ("llama", "qwen3") and not reentrant
    passes = 1 if reentrant else 2  # the first, without gradients, is by the linears' own forwards
    assert [options["memory"] for options in calls] == ["memory" if least else "balanced"] * (2 * passes)


def test_a_layer_that_ends_with_its_mlp_computes_it_once(calls, monkeypatch):
    """And its gate and up once more in backward: checkpointing stops at what is kept first."""
    ran, forward = [], lora_mlp.forward_passes
    monkeypatch.setattr(lora_mlp, "forward_passes", lambda *given: ran.append(given) or forward(*given))
    model = adapted("llama")
    fastpeft.accelerate(model, parts=["mlp", "norm"], memory="memory")
    step(model)
    assert (len(calls), len(ran)) == (4, 2)


def kept_by(model, x):
    exempt = [x, *model.parameters(), *model.buffers()]
    with SavedBytes(exempt) as saved:
        y = model(x)
    total = saved.total()
    y.sum().backward()
    return total


def test_what_is_kept(calls, no_checkpointing):
    """Less by every policy, and by glu alone where the linears run their own forwards."""
    model = adapted("llama")
    module = mlps(model)[0]
    x = torch.randn(40, 32, requires_grad=True)
    kept = {"before": kept_by(module, x)}
    for memory in lora_mlp.MEMORY:
        fastpeft.accelerate(model, parts=["mlp"], memory=memory)
        kept[memory] = kept_by(module, x)
    wide, ranks = 40 * 48 * 4, 40 * 2 * 4
    assert kept["speed"] == 3 * wide + 3 * ranks
    assert kept["balanced"] == 2 * wide + 3 * ranks
    assert kept["memory"] == 0
    assert kept["before"] >= 4 * wide
    handle = module.up_proj.register_forward_hook(lambda *_: None)
    assert kept["speed"] <= kept_by(module, x) < kept["before"]
    handle.remove()


def test_a_compiled_mlp_has_no_graph_break(calls):
    torch.compiler.reset()
    model = adapted("llama", lora_dropout=0.0)
    module = mlps(model)[0]
    x = torch.randn(5, 32, requires_grad=True)
    fastpeft.accelerate(model, parts=["mlp"])
    want = module(x)
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert_close("y", got, want, OTHER_ORDER_OF_SUMS)
    pair = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
    assert_close("dx", *pair, OTHER_ORDER_OF_SUMS)
