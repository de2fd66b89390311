"""AdaLoRA: its ranks fall from the second step on."""

from tests.every_method.method_case import MethodCase

SCHEDULE = {"init_r": 6, "target_r": 3, "lora_alpha": 32, "tinit": 1, "tfinal": 10, "deltaT": 2, "total_step": 30}

CASES = {
    "adalora": MethodCase("AdaLoraConfig", SCHEDULE, learning_rate=3e-2),
}
