"""A model under Hugging Face PEFT, trained with all parts of accelerate: curves, files and dtypes of the untouched model."""

import peft
import pytest
import torch
import transformers

import fastpeft
from tests import tiny_models
from tests.tolerance import EQUAL_TO_THREE_DIGITS, LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close

TENSORS = "adapter_model.safetensors"


def _llama(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(tiny_models.llama(initializer_range=0.2), config).train()


def _bert(**options):
    torch.manual_seed(0)
    base = tiny_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value", "dense"], task_type="SEQ_CLS", **options
    )
    return peft.get_peft_model(base, config).train()


def _batches(build, steps):
    """Rows of unequal lengths, padded and masked, with labels."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        first = torch.randint(0, 9, (4, 1), generator=generator)
        ids = 1 + (first + torch.arange(16)) * 7 % 9
        mask = torch.arange(16) < torch.randint(4, 17, (4, 1), generator=generator)
        labels = torch.where(mask, ids, -100) if build is _llama else ids[:, 0] % 3
        yield {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def _losses(model, build, steps=50):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for batch in _batches(build, steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("memory", ["speed", "balanced", "memory"])
@pytest.mark.parametrize("build", [_llama, _bert])
def test_fifty_steps_have_the_untouched_models_losses(build, memory):
    expected = _losses(build(), build)
    assert expected[-5:].mean() < 0.8 * expected[:5].mean()  # it learns
    model = build()
    acceleration = fastpeft.accelerate(model, memory=memory)
    with acceleration.fast_matmul():
        got = _losses(model, build)
    assert_close("losses", got, expected, EQUAL_TO_THREE_DIGITS)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("build", [_llama, _bert])
def test_saved_adapters_are_the_same_files(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "before")
    fastpeft.accelerate(model)
    model.save_pretrained(tmp_path / "accelerated")
    fastpeft.restore(model)
    model.save_pretrained(tmp_path / "restored")
    before = (tmp_path / "before" / TENSORS).read_bytes()
    assert before == (tmp_path / "accelerated" / TENSORS).read_bytes() == (tmp_path / "restored" / TENSORS).read_bytes()


@pytest.mark.parametrize("build", [_llama, _bert])
def test_transformers_trainer_saves_what_plain_peft_loads(build, tmp_path):
    model = build()
    untrained = tiny_models.logits(model.eval())
    acceleration = fastpeft.accelerate(model.train())
    batch = {name: list(value) for name, value in next(_batches(build, 1)).items()}
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    with acceleration.fast_matmul():
        transformers.Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(tmp_path / "adapter")
    trained = tiny_models.logits(model.eval())
    assert not torch.allclose(trained, untrained)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    for folder in (tmp_path / "adapter", checkpoint):
        plain = peft.PeftModel.from_pretrained(_base_of(build), folder).eval()
        assert_close("logits", tiny_models.logits(plain), trained, LOGITS_EQUAL_TO_PEFT)
    fastpeft.restore(model)
    assert_bits_equal("restored", tiny_models.logits(model), tiny_models.logits(plain))


def _base_of(build):
    return build().unload()


@pytest.mark.parametrize("prepare", [fastpeft.prepare_for_training, fastpeft.prepare_model_for_kbit_training])
def test_bfloat16_stays_bfloat16(prepare):
    """bitsandbytes #1569: PEFT's preparation makes norms, embeddings and head float32, and all between them float32 with them."""

    def dtypes_between_modules(prepared):
        found = set()
        for module in prepared.modules():
            module.register_forward_hook(
                lambda module, args, y: found.add(y.dtype) if isinstance(y, torch.Tensor) else None
            )
        prepared(input_ids=tiny_models.token_ids(), labels=tiny_models.token_ids()).loss.float().backward()
        return found

    model = tiny_models.llama().to(torch.bfloat16)
    model = fastpeft.get_peft_model(prepare(model), fastpeft.LoraConfig(r=4, target_modules="all-linear")).train()
    before = {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    fastpeft.accelerate(model, memory="memory")
    assert {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()} == before
    base = model.get_base_model()
    assert {p.dtype for name, p in base.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    assert dtypes_between_modules(model) == {torch.bfloat16}
    theirs = tiny_models.llama().to(torch.bfloat16)
    theirs.is_loaded_in_8bit = True
    theirs = peft.prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    assert theirs.get_input_embeddings().weight.dtype == torch.float32  # what this test would find
