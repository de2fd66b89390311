"""Code as PEFT's documentation has it runs with the import line changed, and does what it does with PEFT.

The snippets are restated, on tiny local models. They run in a namespace with BASE and SEQ2SEQ (folders of models), FOLDER
(empty), BATCH, SEQ_BATCH, MLP and `step(model, batch)`; each leaves in RESULT what both libraries must agree on.
"""

import functools

import pytest
import torch
from torch import nn

from tests import tiny_models
from tests.training import tiny

SNIPPETS = {
    "lora": """
from transformers import AutoModelForSeq2SeqLM
from peft import LoraConfig, TaskType, get_peft_model

peft_config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
model = AutoModelForSeq2SeqLM.from_pretrained(SEQ2SEQ)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()
step(model, SEQ_BATCH)
model.save_pretrained(FOLDER)
RESULT = model.get_nb_trainable_parameters()
""",
    "auto": """
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(task_type="CAUSAL_LM"))
model.save_pretrained(FOLDER)

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)
model.eval()
outputs = model.generate(**{k: v for k, v in BATCH.items() if k != "labels"}, max_new_tokens=3, do_sample=False)
RESULT = (tuple(outputs.shape), type(model).__name__)
""",
    "config_first": """
from transformers import AutoModelForCausalLM
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(FOLDER)

config = PeftConfig.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
lora_model = PeftModel.from_pretrained(model, FOLDER)
RESULT = (config.r, config.peft_type == "LORA", lora_model.get_nb_trainable_parameters())
""",
    "several_adapters": """
from transformers import AutoModelForCausalLM
from peft import LoraConfig, PeftModel, get_peft_model

get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(FOLDER)

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER, adapter_name="first")
model.load_adapter(FOLDER, adapter_name="second")
model.set_adapter("second")
active = model.active_adapters
with model.disable_adapter():
    base_logits = model(**BATCH).logits
model.delete_adapter("first")
model = model.merge_and_unload()
RESULT = (active, torch.allclose(base_logits, model(**BATCH).logits, atol=1e-5), type(model).__name__)
""",
    "get_peft_config": """
from transformers import AutoModelForCausalLM
from peft import get_peft_config, get_peft_model

config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": False,
    "r": 8,
    "target_modules": ["q_proj", "v_proj"],
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "fan_in_fan_out": False,
    "bias": "none",
}
model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), get_peft_config(config))
step(model, BATCH)
RESULT = model.get_nb_trainable_parameters()
""",
    "custom_model": """
from peft import LoraConfig, get_peft_model

config = LoraConfig(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"])
model = get_peft_model(MLP(), config)
model.print_trainable_parameters()
model(torch.ones(2, 20)).sum().backward()
RESULT = sorted(name for name, parameter in model.named_parameters() if parameter.grad is not None)
""",
    "injection": """
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

lora_config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["0"])
model = inject_adapter_in_model(lora_config, MLP().seq)
outputs = model(torch.ones(2, 20))
peft_state_dict = get_peft_model_state_dict(model)
fresh = inject_adapter_in_model(lora_config, MLP().seq)
load_result = set_peft_model_state_dict(fresh, peft_state_dict)
RESULT = (sorted(peft_state_dict), list(load_result.unexpected_keys), tuple(outputs.shape))
""",
    "status": """
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_layer_status, get_model_status, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(task_type="CAUSAL_LM"))
layers, status = get_layer_status(model), model.get_model_status()
RESULT = (len(layers), layers[0].name, status.enabled, status.active_adapters, get_model_status(model).trainable_params)
""",
    "kbit": """
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

model = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(BASE))
names = ["q_proj", "k_proj", "v_proj", "o_proj"]
config = LoraConfig(r=16, lora_alpha=8, target_modules=names, bias="none", lora_dropout=0.05, task_type="CAUSAL_LM")
model = get_peft_model(model, config)
step(model, BATCH)
RESULT = model.get_nb_trainable_parameters()
""",
    "dora": """
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(use_dora=True, target_modules="all-linear"))
step(model, BATCH)
RESULT = model.get_nb_trainable_parameters()
""",
    "ia3": """
from transformers import AutoModelForSeq2SeqLM
from peft import IA3Config, get_peft_model

peft_config = IA3Config(task_type="SEQ_2_SEQ_LM")
model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(SEQ2SEQ), peft_config)
model.print_trainable_parameters()
step(model, SEQ_BATCH)
model.save_pretrained(FOLDER)
RESULT = model.get_nb_trainable_parameters()
""",
    "oft": """
from transformers import AutoModelForCausalLM
from peft import OFTConfig, get_peft_model

config = OFTConfig(oft_block_size=16, target_modules=["q_proj", "v_proj"], module_dropout=0.0, bias="none", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
step(model, BATCH)
RESULT = model.get_nb_trainable_parameters()
""",
    "boft": """
from transformers import AutoModelForCausalLM
from peft import BOFTConfig, get_peft_model

names = ["q_proj", "v_proj"]
config = BOFTConfig(
    boft_block_size=4, boft_n_butterfly_factor=1, target_modules=names, boft_dropout=0.1, bias="boft_only"
)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
step(model, BATCH)
RESULT = model.get_nb_trainable_parameters()
""",
    "ln_tuning": """
from transformers import AutoModelForCausalLM
from peft import LNTuningConfig, TaskType, get_peft_model

model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LNTuningConfig(task_type=TaskType.CAUSAL_LM))
step(model, BATCH)
RESULT = model.get_nb_trainable_parameters()
""",
    "adalora": """
from transformers import AutoModelForCausalLM
from peft import AdaLoraConfig, get_peft_model

names = ["q_proj", "v_proj"]
config = AdaLoraConfig(
    init_r=6, target_r=4, tinit=2, tfinal=2, total_step=10, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM"
)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
step(model, BATCH)
model.base_model.update_and_allocate(1)
RESULT = model.get_nb_trainable_parameters()[0]  # PEFT also counts its frozen ranknum
""",
    "prompt_tuning": """
from transformers import AutoModelForCausalLM
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

peft_config = PromptTuningConfig(
    task_type=TaskType.CAUSAL_LM,
    prompt_tuning_init=PromptTuningInit.TEXT,
    num_virtual_tokens=4,
    prompt_tuning_init_text="say lovely w1 w2",
    tokenizer_name_or_path=BASE,
)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), peft_config)
model.print_trainable_parameters()
step(model, BATCH)
model.save_pretrained(FOLDER)
outputs = model.generate(**{k: v for k, v in BATCH.items() if k != "labels"}, max_new_tokens=3, do_sample=False)
RESULT = (model.get_nb_trainable_parameters(), tuple(outputs.shape))
""",
    "prefix_tuning": """
from transformers import AutoModelForSeq2SeqLM
from peft import PrefixTuningConfig, TaskType, get_peft_model

peft_config = PrefixTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=5)
model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(SEQ2SEQ), peft_config)
model.print_trainable_parameters()
step(model, SEQ_BATCH)
model.save_pretrained(FOLDER)
RESULT = model.get_nb_trainable_parameters()
""",
    "p_tuning": """
from transformers import AutoModelForCausalLM
from peft import PromptEncoderConfig, get_peft_model

peft_config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), peft_config)
model.print_trainable_parameters()
step(model, BATCH)
RESULT = model.get_nb_trainable_parameters()
""",
    "multitask_prompt_tuning": """
from transformers import AutoModelForSeq2SeqLM
from peft import MultitaskPromptTuningConfig, MultitaskPromptTuningInit, TaskType, get_peft_model

peft_config = MultitaskPromptTuningConfig(
    task_type=TaskType.SEQ_2_SEQ_LM,
    num_tasks=2,
    num_virtual_tokens=4,
    num_transformer_submodules=1,
    prompt_tuning_init=MultitaskPromptTuningInit.RANDOM,
    prompt_tuning_init_text="say lovely",
    tokenizer_name_or_path=BASE,
)
model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(SEQ2SEQ), peft_config)
step(model, {**SEQ_BATCH, "task_ids": torch.tensor([0, 1])})
RESULT = model.get_nb_trainable_parameters()
""",
}

NOT_THERE_YET: set[str] = set()
"""Snippets of methods that fastpeft does not have. One that runs must be taken out: xfail is strict."""


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x):
        return self.seq(x)


def step(model, batch) -> None:
    """One optimizer step, which must move what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick_tours")
    tiny.llama(folder / "llama")
    torch.manual_seed(0)
    tiny_models.t5().save_pretrained(folder / "t5")
    return folder


def run(code: str, library: str, models, folder):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    namespace = {
        "BASE": str(models / "llama"), "SEQ2SEQ": str(models / "t5"), "FOLDER": str(folder), "MLP": MLP, "BATCH": batch,
        "SEQ_BATCH": batch, "step": step, "torch": torch,
    }  # fmt: skip
    torch.manual_seed(0)
    exec(code.replace("\nfrom peft import", f"\nfrom {library} import"), namespace)
    return namespace["RESULT"]


@pytest.fixture(scope="module")
def of_peft(models, tmp_path_factory):
    """What a snippet gives with PEFT itself."""
    return functools.cache(lambda name: run(SNIPPETS[name], "peft", models, tmp_path_factory.mktemp(f"peft_{name}")))


CASES = [
    pytest.param(name, marks=pytest.mark.xfail(raises=ImportError, strict=True)) if name in NOT_THERE_YET else name
    for name in SNIPPETS
]


@pytest.mark.parametrize("name", CASES)
def test_the_snippet_runs_as_with_peft(name, models, of_peft, tmp_path):
    expected = of_peft(name)
    assert run(SNIPPETS[name], "fastpeft", models, tmp_path) == expected
