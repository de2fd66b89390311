"""accelerate's part "norm": the same results as transformers' norms in every family, no less accurate, and undone exactly."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastpeft import LNTuningConfig, get_peft_model
from fastpeft.integrations.acceleration import accelerate, restore
from fastpeft.integrations.acceleration.ledger import Acceleration
from fastpeft.reference.norm import rms_norm as formula
from tests import tiny_models
from tests.architectures import ARCHITECTURES
from tests.saved_bytes import SavedBytes
from tests.tolerance import (
    BF16_TRAINING,
    GRADIENTS_THROUGH_A_MODEL,
    NO_LESS_ACCURATE,
    OTHER_ORDER_OF_SUMS,
    assert_bits_equal,
    assert_close,
    assert_no_worse,
)

BF16, FP32 = torch.bfloat16, torch.float32
# how many RMSNorms and LayerNorms two layers have: a last one and two, four (q_norm, k_norm or Gemma's) or six per layer
FAMILIES = {
    "llama": (5, 0),
    "mistral": (5, 0),
    "qwen2": (5, 0),
    "qwen3": (9, 0),
    "gemma2": (9, 0),
    "gemma3_text": (13, 0),
    "phi3": (5, 0),
    "t5": (12, 0),
    "phi": (0, 3),
    "gpt2": (0, 5),
    "bert": (0, 5),
    "roberta": (0, 5),
    "distilbert": (0, 5),
}
NORMS = {"llama": LlamaRMSNorm, "gemma3": Gemma3RMSNorm, "t5": T5LayerNorm, "olmo2": Olmo2RMSNorm}


def build(name, seed=0):
    """A model whose norms' weights are not all ones."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1 and path.endswith("weight"):
                parameter += torch.randn_like(parameter) * 0.2
    return model


def results(model):
    """{name: tensor} of logits and every gradient."""
    model.zero_grad()
    logits = model(**tiny_models.inputs(model)).logits
    logits.float().mul(8).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


def swapped(norm: nn.Module) -> tuple[nn.Module, Acceleration]:
    """A copy of `norm` as the part makes it in a model, and the ledger."""
    model = tiny_models.small_llama()
    model.model.norm = copy.deepcopy(norm)
    return model.model.norm, accelerate(model, parts=["norm"])


@pytest.mark.parametrize("name", FAMILIES)
def test_same_results_in_every_family(name):
    model = build(name)
    untouched, classes = results(model), [type(module) for module in model.modules()]
    rms, layer = FAMILIES[name]
    ledger = accelerate(model, parts=["norm"])
    assert (len(ledger.slots), len(ledger.kept)) == (rms, layer)
    assert {item.kind for item in ledger.kept} <= {"LayerNorm"}
    got = results(model)
    assert got.keys() == untouched.keys()
    for path, value in got.items():
        assert_close(path, value, untouched[path], GRADIENTS_THROUGH_A_MODEL)
    assert not ledger.fallbacks
    restore(model)
    assert [type(module) for module in model.modules()] == classes
    for path, value in results(model).items():
        assert_bits_equal(path, value, untouched[path])


def test_heads_are_normalised_too():
    ledger = accelerate(build("qwen3"), parts=["norm"])
    assert sum("q_norm" in slot.path or "k_norm" in slot.path for slot in ledger.slots) == 4
    assert "norm       Qwen3RMSNorm                 9 of 9 replaced" in ledger.summary()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "t5"])
def test_bfloat16_is_no_worse_than_the_untouched_model(name):
    model = build(name).to(BF16)
    exact = results(copy.deepcopy(model).double())
    untouched = results(model)
    accelerate(model, parts=["norm"])
    for path, value in results(model).items():
        assert_no_worse(path, value, exact[path], untouched[path])


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, BF16), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_no_less_accurate(kind, dtypes):
    """y and both gradients against float64; y in the dtype that transformers gives it, whatever x and the weight have."""
    x_dtype, w_dtype = dtypes
    norm = NORMS[kind](96, eps=1e-5)
    with torch.no_grad():
        norm.weight += torch.randn(96) * 0.3
    norm = norm.to(w_dtype)
    fast, ledger = swapped(norm)
    assert isinstance(fast, NORMS[kind])
    x = (torch.randn(3, 37, 96) + 0.25).to(x_dtype)

    def values(norm):
        of_x = x.clone().requires_grad_()
        y = norm(of_x)
        return y.detach(), *torch.autograd.grad(y, (of_x, norm.weight), dy.to(y.dtype))

    dy = torch.randn(3, 37, 96).to(BF16)
    wide, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = formula(wide, weight, eps=1e-5, offset=1.0 if kind == "gemma3" else 0.0)
    exact = y.detach(), *torch.autograd.grad(y, (wide, weight), dy.double())
    for name, got, want, theirs in zip(("y", "dx", "dweight"), values(fast), exact, values(norm)):
        assert_no_worse(name, got, want, theirs, factor=NO_LESS_ACCURATE)
    assert not ledger.fallbacks


@pytest.mark.parametrize("w_dtype", [BF16, FP32], ids=str)
def test_no_float32_copy_of_x_is_kept(w_dtype):
    """Also where the weight is float32, as PEFT's and TRL's preparation for 4 bits leaves it."""
    norm = LlamaRMSNorm(64).to(w_dtype)
    fast, _ = swapped(norm)
    x = torch.randn(5, 64).to(BF16).requires_grad_()
    kept = []
    for module in (norm, fast):
        with SavedBytes([x, module.weight]) as saved:
            _y = module(x)
        kept.append(saved.total())
    assert kept[1] == 5 * 4
    assert kept[0] >= 5 * 64 * 4


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_layernorm_tuning_trains_the_same(dtype):
    """fastpeft's wrappers hold the frozen norm and a float32 copy of it: both are replaced."""
    runs = []
    for fast in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(build("llama").to(dtype), LNTuningConfig(target_modules=["input_layernorm", "norm"]))
        ledger = accelerate(model, parts=["norm"]) if fast else None
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(4):
            loss = tiny_models.loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        runs.append((torch.stack(losses), trained))
    assert len(ledger.slots) == 5 + 3
    assert all(p.dtype == FP32 for p in runs[1][1].values())
    limit = OTHER_ORDER_OF_SUMS if dtype == FP32 else BF16_TRAINING
    assert runs[0][0][-1] < runs[0][0][0] * 0.99
    assert_close("losses", runs[1][0], runs[0][0], limit)
    for name, value in runs[1][1].items():
        assert_close(name, value, runs[0][1][name], limit)


@pytest.mark.parametrize("how", ["modules_to_save", "ln_tuning"])
def test_norms_inside_peft(how):
    """PEFT keeps the frozen norm and a copy that trains, beside each other; both are replaced, and both still switch."""
    config = (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"])
        if how == "modules_to_save"
        else peft.LNTuningConfig(target_modules=["post_attention_layernorm"])
    )
    model = peft.get_peft_model(build("llama"), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "layernorm" in name:
            parameter.data += 0.5
    untouched = results(model)
    with model.disable_adapter():
        plain = tiny_models.logits(model)
    ledger = accelerate(model, parts=["norm"])
    kinds = ("original_module", "modules_to_save") if how == "modules_to_save" else ("base_layer", "ln_tuning_layers")
    assert [sum(kind in slot.path for slot in ledger.slots) for kind in kinds] == [2, 2]
    got = results(model)
    assert sum("layernorm" in path for path in got) == 2
    for path, value in got.items():
        assert_close(path, value, untouched[path], GRADIENTS_THROUGH_A_MODEL)
    with model.disable_adapter():
        assert_close("disabled", tiny_models.logits(model), plain, GRADIENTS_THROUGH_A_MODEL)
    restore(model)
    assert_bits_equal("restored", results(model)["logits"], untouched["logits"])


class Gated(LlamaRMSNorm):
    """Llama's, with a gate that only some calls pass."""

    def forward(self, hidden_states, gate=None):
        y = super().forward(hidden_states)
        return y if gate is None else y * gate.sigmoid()


class Grouped(LlamaRMSNorm):
    """Normalises halves of the columns."""

    def forward(self, x):
        halves = x.unflatten(-1, (2, -1))
        return (halves * (halves.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()).flatten(
            -2
        ) * self.weight


class InFloat32(LlamaRMSNorm):
    """Its result is float32 whatever it gets: a rule that none of the replacements has."""

    def forward(self, x):
        return super().forward(x.float()).float()


class WithBias(LlamaRMSNorm):
    """Adds a bias, which structure alone shows."""

    def __init__(self, size):
        super().__init__(size)
        self.bias = nn.Parameter(torch.ones(size))


@pytest.mark.parametrize(
    "norm", [CohereLayerNorm(32), Grouped(32), InFloat32(32)], ids=lambda norm: type(norm).__name__
)
def test_what_computes_something_else_is_kept(norm):
    with torch.no_grad():
        norm.weight += 0.5
    kept, ledger = swapped(norm)
    assert type(kept) is type(norm)
    (item,) = [item for item in ledger.kept if item.path == "model.norm"]
    assert "computes something else" in item.why


def test_what_does_not_look_like_a_norm_is_not_listed():
    kept, ledger = swapped(WithBias(32))
    assert type(kept) is WithBias
    assert not [item for item in (*ledger.kept, *ledger.slots) if item.path == "model.norm"]


def test_eps_is_where_the_module_has_it():
    """Outside the root instead of inside: the rows of size one would not tell."""

    class Outside(LlamaRMSNorm):
        def forward(self, x):
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)

    kept, _ = swapped(Outside(32))
    assert type(kept) is Outside


def test_calls_that_the_op_does_not_know_fall_back():
    norm = Gated(32)
    fast, ledger = swapped(norm)
    x, gate = torch.randn(3, 32), torch.randn(3, 32)
    assert_close("plain", fast(x), norm(x), OTHER_ORDER_OF_SUMS)
    assert not ledger.fallbacks
    assert_bits_equal("gated", fast(x, gate), norm(x, gate))
    assert_bits_equal("by name", fast(x, gate=gate), norm(x, gate))
    assert_bits_equal("one column", fast(x[:, :1]), norm(x[:, :1]))
    assert ledger.fallbacks == {
        ("norm", "called with more than x"): 2,
        ("norm", "x is not floating [..., 32]"): 1,
    }
    assert "2 calls ran the model's own code: called with more than x" in ledger.summary()


def test_a_forward_of_other_code_stays():
    """Hugging Face's kernels and accelerate's offloading both set `forward` on the instance."""
    model = tiny_models.small_llama()
    model.model.norm.forward = model.model.norm.forward
    ledger = accelerate(model, parts=["norm"])
    assert type(model.model.norm) is LlamaRMSNorm
    assert [item.path for item in ledger.kept] == ["model.norm"]


def test_asking_the_modules_leaves_no_trace():
    """No random number is drawn, no value or flag changes, and a copy of an accelerated model is an untouched one."""
    model = build("gemma3_text")
    state, before, flags = torch.get_rng_state(), tiny_models.bits(model), tiny_models.flags(model)
    accelerate(model, parts=["norm"])
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_models.flags(model) == flags
    for name, value in tiny_models.bits(model).items():
        assert_bits_equal(name, value, before[name])
    assert sum(type(module) is Gemma3RMSNorm for module in copy.deepcopy(model).modules()) == 13


def test_models_without_values():
    """On meta tensors and under FakeTensorMode the modules are asked all the same, and a step is followed."""
    with torch.device("meta"):
        assert len(accelerate(ARCHITECTURES["gemma2"](), parts=["norm"]).slots) == 9
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = ARCHITECTURES["qwen3"]()
        assert len(accelerate(model, parts=["norm"]).slots) == 9
        ids = torch.zeros(2, 5, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = build("llama").train()
    untouched = results(model)
    accelerate(model, parts=["norm"])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for path, value in results(model).items():
        assert_close(path, value, untouched[path], GRADIENTS_THROUGH_A_MODEL)


def test_compile_has_no_break():
    torch.compiler.reset()
    fast, _ = swapped(LlamaRMSNorm(32))
    x = torch.randn(2, 3, 32, requires_grad=True)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_bits_equal("y", compiled(x).detach(), fast(x).detach())
    for one, other in zip(*[torch.autograd.grad(f(x).square().sum(), (x, fast.weight)) for f in (compiled, fast)]):
        assert_bits_equal("gradient", one, other)


def test_autocast_gives_the_same_dtypes():
    """Under autocast a float32 norm over bfloat16 gives float32, as the module's own code does."""
    norm = LlamaRMSNorm(32)
    fast, _ = swapped(norm)
    x = torch.randn(3, 32).to(BF16)
    with torch.autocast("cpu", dtype=BF16):
        got, expected = fast(x), norm(x)
    assert got.dtype == expected.dtype == FP32
    exact = formula(x.double(), norm.weight.detach().double(), eps=norm.variance_epsilon)
    assert_no_worse("y", got.detach(), exact, expected.detach())
