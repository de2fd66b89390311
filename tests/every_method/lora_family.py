"""LoRA and its relatives."""

from tests.every_method.method_case import MethodCase

CASES = {
    "lora": MethodCase("LoraConfig", {"r": 4}),
    "lora_all_linear": MethodCase("LoraConfig", {"r": 4, "target_modules": "all-linear"}, models=("llama", "bert")),
    "rslora": MethodCase("LoraConfig", {"r": 4, "use_rslora": True}, models=("llama", "bert")),
    "dora": MethodCase("LoraConfig", {"r": 4, "use_dora": True}),
    "orthogonal": MethodCase("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}, models=("llama", "gpt2")),
    "eva": MethodCase("LoraConfig", {"r": 4, "init_lora_weights": "eva"}, models=("llama",)),
    "pissa": MethodCase("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}, over_nf4=False),
    "pissa_dora": MethodCase(
        "LoraConfig", {"r": 4, "init_lora_weights": "pissa", "use_dora": True}, models=("llama",), over_nf4=False
    ),
    # peft gives A and B of a Conv1D each other's shapes
    "olora": MethodCase("LoraConfig", {"r": 4, "init_lora_weights": "olora"}, models=("llama", "bert", "t5")),
    # "loftq" is in tests/test_changed_base.py: peft starts it on a GPU only
    "lora_parameters": MethodCase(
        "LoraConfig",
        {"r": 4, "target_modules": [], "target_parameters": ["q_proj.weight", "v_proj.weight"]},
        models=("llama",),
        over_nf4=False,
        same_names=False,
    ),
}
