"""LoRA and its relatives."""

from tests.every_method.method_case import MethodCase

CASES = {
    "lora": MethodCase("LoraConfig", {"r": 4}),
    "lora_all_linear": MethodCase("LoraConfig", {"r": 4, "target_modules": "all-linear"}, models=("llama", "bert")),
    "rslora": MethodCase("LoraConfig", {"r": 4, "use_rslora": True}, models=("llama", "bert")),
    "dora": MethodCase("LoraConfig", {"r": 4, "use_dora": True}),
}
