"""IA3, OFT, BOFT and LN tuning in a model: an adapter per item of a batch, half precision, quantised weights, torch.compile."""

import pytest
import torch

import fastpeft
from fastpeft import get_peft_model
from tests import tiny_models
from tests.tiny_models import fill
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, rms

IDS = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [7, 8, 9, 7, 8]])
KINDS = {
    "ia3": fastpeft.IA3Config,
    "oft": lambda: fastpeft.OFTConfig(oft_block_size=8, target_modules="all-linear"),
    "boft": lambda: fastpeft.BOFTConfig(target_modules="all-linear"),
    "ln_tuning": fastpeft.LNTuningConfig,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_item_of_a_batch_goes_through_its_own_adapter(kind):
    wrapped = get_peft_model(tiny_models.llama(), KINDS[kind](), "a")
    wrapped.add_adapter("b", KINDS[kind]())
    rows = []
    for name, seed in (("a", 1), ("b", 2)):
        wrapped.set_adapter(name)
        fill(wrapped, seed=seed)
    wrapped.eval()
    for row, name in zip(IDS, ("a", "__base__", "b"), strict=True):
        if name == "__base__":
            with wrapped.disable_adapter():
                rows.append(wrapped(input_ids=row[None]).logits)
        else:
            wrapped.set_adapter(name)
            rows.append(wrapped(input_ids=row[None]).logits)
    mixed = wrapped(input_ids=IDS, adapter_names=["a", "__base__", "b"]).logits
    assert_close("logits", mixed, torch.cat(rows), OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_adapters_are_float32_and_learn(kind):
    wrapped = get_peft_model(tiny_models.llama().bfloat16(), KINDS[kind]())
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    logits = wrapped(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained)
    assert any(parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", ["ia3", "oft", "boft"])
def test_merged_into_a_quantised_weight_and_taken_out(method, kind):
    """PEFT has no such merge for IA3. The merged weight is quantised anew, so it is near, not equal."""
    wrapped = get_peft_model(fastpeft.quantize(tiny_models.llama().eval(), kind), KINDS[method]()).eval()
    plain = wrapped(input_ids=IDS).logits
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    moved = wrapped(input_ids=IDS).logits
    wrapped.merge_adapter(safe_merge=True)
    merged = wrapped(input_ids=IDS).logits
    assert rms(merged - moved) < rms(plain - moved)
    wrapped.unmerge_adapter()
    assert_bits_equal("unmerged", wrapped(input_ids=IDS).logits, moved)


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_without_a_break(kind):
    layer = next(layer for _, layer in get_peft_model(tiny_models.llama(), KINDS[kind]()).base_model.layers())
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close("y", compiled(x), layer(x), OTHER_ORDER_OF_SUMS)
