"""Adapters that act on changed base weights (PiSSA, OLoRA, LoftQ), in a model: when these stand in it, and files."""

import copy

import peft
import pytest
import torch

import fastpeft
from fastpeft import LoraConfig, get_peft_model
from tests import tiny_models
from tests.tiny_models import bits, fill, logits
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, MERGED_EQUALS_UNMERGED, assert_bits_equal, assert_close

TARGETS = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
KINDS = ["pissa", "pissa_niter_4", "olora", "loftq"]


def fresh():
    torch.manual_seed(0)
    return tiny_models.small_llama()


def started(kind, model=None, **options):
    wrapped = get_peft_model(
        fresh() if model is None else model, LoraConfig(init_lora_weights=kind, **TARGETS, **options)
    )
    return wrapped.eval()


def trained(kind, **options):
    wrapped = started(kind, **options)
    moved(wrapped)
    return wrapped


def moved(wrapped, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def own_bits(model):
    return {key.replace(".base_layer", ""): tensor for key, tensor in bits(model).items() if "lora_" not in key}


def assert_untouched(model, base):
    after = own_bits(model)
    for key, tensor in bits(base).items():
        assert_bits_equal(key, after[key], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_changes_only_while_the_adapter_acts(kind):
    base = fresh()
    model = copy.deepcopy(base)
    parameters = {id(parameter) for parameter in model.parameters()}
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2), "plain").eval()
    wrapped.add_adapter("p", LoraConfig(init_lora_weights=kind, **TARGETS))
    assert_untouched(wrapped.get_base_model(), base)
    wrapped.set_adapter("p")
    changed = logits(wrapped)
    assert not torch.equal(own_bits(wrapped.get_base_model())["model.layers.0.self_attn.q_proj.weight"],
                           bits(base)["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
    with wrapped.disable_adapter():
        assert_untouched(wrapped.get_base_model(), base)
    assert_bits_equal("again", logits(wrapped), changed)
    wrapped.set_adapter("plain")
    assert_untouched(wrapped.get_base_model(), base)
    wrapped.set_adapter(["plain", "p"])
    assert_close("plain adds nothing yet", logits(wrapped), changed, MERGED_EQUALS_UNMERGED)
    plain = wrapped.unload()
    assert {id(parameter) for parameter in plain.parameters()} == parameters
    assert_untouched(plain, base)


def test_two_of_them_cannot_act_together():
    wrapped = started("pissa")
    wrapped.add_adapter("other", LoraConfig(init_lora_weights="olora", **TARGETS))
    before = logits(wrapped)
    for refused in (
        wrapped.set_adapter,
        wrapped.merge_adapter,
        lambda names: wrapped.merge_and_unload(adapter_names=names),
    ):
        with pytest.raises(ValueError, match="changed base weights"):
            refused(["default", "other"])
    assert wrapped.active_adapters == ["default"]
    assert_bits_equal("logits", logits(wrapped), before)


def test_the_second_starts_from_the_base_s_own_weights():
    """Also while the first acts or is merged: what stands in the model then is not the base."""
    alone = started("olora").state_dict()
    for merged in (False, True):
        wrapped = trained("pissa")
        if merged:
            wrapped.merge_adapter()
        wrapped.add_adapter("second", LoraConfig(init_lora_weights="olora", **TARGETS))
        wrapped.unmerge_adapter()
        wrapped.set_adapter("second")
        for key, tensor in wrapped.state_dict().items():
            if ".default" not in key:
                assert_bits_equal(key, tensor, alone[key.replace(".second", ".default")])


def test_dora_beside_one_is_refused():
    wrapped = started("pissa")
    wrapped.add_adapter("dora", LoraConfig(use_dora=True, **TARGETS))
    with pytest.raises(ValueError, match="DoRA"):
        wrapped.set_adapter(["default", "dora"])


def test_a_failure_leaves_the_model_untouched():
    """The rank fits the first module and not the last: nothing has changed in the first."""
    base = tiny_models.small_llama(num_key_value_heads=1)
    before = bits(base)
    with pytest.raises(ValueError, match="at most"):
        get_peft_model(base, LoraConfig(r=16, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]))
    after = bits(base)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert_bits_equal(key, after[key], tensor)


def test_rows_of_several_adapters_are_refused():
    wrapped = started("pissa")
    with pytest.raises(NotImplementedError, match="default"):
        wrapped(input_ids=tiny_models.token_ids(), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_for_good(kind, dtype):
    wrapped = started(kind, fresh().to(dtype))
    moved(wrapped)
    weights = {
        path: layer.parameters_under(["default"]).dense().float() + layer.delta_weight("default")
        for path, layer in wrapped.base_model.layers()
    }
    plain = wrapped.merge_and_unload(safe_merge=True)
    for path, expected in weights.items():
        assert_bits_equal(path, plain.get_submodule(path).weight.data, expected.to(dtype))


def test_safe_merge_beside_a_merged_adapter():
    """merge_and_unload looked at the merged weights instead of the base's, and added the merged adapter twice."""
    wrapped = tiny_models.trained()
    wrapped.merge_adapter()
    expected = logits(wrapped)
    assert_close("logits", logits(wrapped.merge_and_unload(safe_merge=True)), expected, MERGED_EQUALS_UNMERGED)
    big = tiny_models.trained()
    for key, parameter in big.named_parameters():
        if "lora_" in key:
            parameter.data.fill_(1.5e19)
    before = bits(big)
    for merge in (big.merge_adapter, big.merge_and_unload):
        with pytest.raises(ValueError, match="not finite"):
            merge(safe_merge=True)
    for key, tensor in bits(big).items():
        assert_bits_equal(key, tensor, before[key])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("from_folder", [False, True], ids=["computed", "from_folder"])
def test_as_plain_lora(kind, rslora, from_folder, tmp_path):
    """delta = s (B A - B0 A0) as rank 2r, on the unmodified base, here and in PEFT."""
    options = {
        "use_rslora": rslora,
        "lora_alpha": 3,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 5.0},
    }
    wrapped = started(kind, **options)
    wrapped.save_pretrained(tmp_path / "initial")
    moved(wrapped)
    initial = tmp_path / "initial" if from_folder else True
    wrapped.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    expected = logits(wrapped)
    ours = fastpeft.PeftModel.from_pretrained(fresh(), tmp_path / "plain")
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "plain").eval()
    assert ours.peft_config["default"].init_lora_weights is True
    assert_close("here and in peft", logits(ours), logits(theirs), LOGITS_EQUAL_TO_PEFT)
    if kind == "loftq":  # the plain form has the full weights below it
        assert not torch.equal(logits(ours), expected)
    else:
        assert_close("logits", logits(ours), expected, MERGED_EQUALS_UNMERGED)


def test_what_cannot_become_plain_is_refused(tmp_path):
    for wrapped, said in ((tiny_models.trained(use_dora=True), "DoRA"), (tiny_models.trained(), "plain LoRA already")):
        with pytest.raises(ValueError, match=said):
            wrapped.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=True)
    tiny_models.trained(r=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="does not fit"):
        trained("pissa").save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_values_of_another_start_do_not_go_into_an_adapter(tmp_path):
    """A and B of a PiSSA adapter mean something else over the base's own weights."""
    trained("pissa").save_pretrained(tmp_path)
    wrapped = started(True)
    with pytest.raises(ValueError, match="init_lora_weights"):
        wrapped.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_peft_reads_and_writes_the_same_half_precision_residual(kind, tmp_path):
    """Both round W - s B A once to bfloat16 from float32 sums."""
    base = fresh().to(torch.bfloat16)
    wrapped = started(kind, copy.deepcopy(base))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(init_lora_weights=kind, **TARGETS))
    weights = theirs.state_dict()
    for key, tensor in wrapped.state_dict().items():
        if "base_layer" in key:
            assert_bits_equal(key, tensor, weights[key])


def test_loftq_over_a_whole_model_is_nearer_than_quantising():
    """The logits of LoftQ's start are nearer to the full model's than those of the quantised weights alone."""
    base = fresh()
    exact = logits(base)
    options = {"r": 8, "target_modules": "all-linear", "loftq_config": {"loftq_bits": 4, "loftq_iter": 5}}
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights="loftq", **options)).eval()
    with_adapter = logits(wrapped)
    fill(wrapped, std=0.0)  # Q alone, as five turns left it
    first = LoraConfig(init_lora_weights="loftq", **options | {"loftq_config": {"loftq_bits": 4}})
    quantized = get_peft_model(copy.deepcopy(base), first).eval()
    fill(quantized, std=0.0)
    assert (with_adapter - exact).norm() < 0.8 * (logits(quantized) - exact).norm()


def test_gradients_reach_a_and_b_alone():
    wrapped = trained("pissa").train()
    tiny_models.loss(wrapped).backward()
    with_gradient = {key for key, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert with_gradient == {key for key, _ in wrapped.named_parameters() if "lora_" in key}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_olora_over_a_quantised_base(kind):
    """The residual is quantised as the base was; off, merged and gone, the base's own bytes are back."""
    base = fastpeft.quantize(fresh(), kind, compute_dtype=torch.float32)
    own = bits(base)
    wrapped = started("olora", base)
    with wrapped.disable_adapter():
        expected = logits(wrapped)
    moved(wrapped)
    acting = logits(wrapped)
    assert not torch.equal(acting, expected)
    wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert_bits_equal("off", logits(wrapped), expected)
    wrapped.unmerge_adapter()
    assert_bits_equal("again", logits(wrapped), acting)
    wrapped.add_adapter("second", LoraConfig(**TARGETS))
    wrapped.set_adapter("second")
    assert_bits_equal("a fresh one", logits(wrapped), expected)
    plain = wrapped.unload()
    for key, tensor in bits(plain).items():
        assert_bits_equal(key, tensor, own[key])


def test_olora_over_nf4_is_peft_s(tmp_path):
    """PEFT quantises the same residual with the same settings, so files fit there too.

    On rows of whole blocks, without nested scales: bitsandbytes' CPU code rounds or reads those in ways of its own.
    """

    def quantized():
        torch.manual_seed(0)
        model = tiny_models.llama(intermediate_size=128, num_hidden_layers=1)
        return fastpeft.quantize(model, "nf4", compute_dtype=torch.float32, double_quant=False)

    wrapped = started("olora", quantized())
    moved(wrapped)
    wrapped.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        quantized(), tmp_path
    ).train()  # in eval mode bitsandbytes repacks the bytes
    assert_close("logits", logits(theirs), logits(wrapped), LOGITS_EQUAL_TO_PEFT)


def test_a_copy_and_a_move_take_everything_along():
    wrapped = trained("pissa")
    twin = copy.deepcopy(wrapped)
    assert_bits_equal("copy", logits(twin), logits(wrapped))
    twin.to(torch.float64)
    with twin.disable_adapter():
        assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
        assert_close("base", logits(twin).float(), logits(fresh().eval()), LOGITS_EQUAL_TO_PEFT)
    twin.delete_adapter("default")
    assert wrapped.active_adapters == ["default"]
    assert_bits_equal("the first", logits(wrapped), logits(trained("pissa")))
