"""Every case of every method, by name."""

from tests.every_method import adalora, bottleneck_family, lora_family, multiplicative, prompts
from tests.every_method.method_case import MethodCase

CASES: dict[str, MethodCase] = {
    **lora_family.CASES,
    **multiplicative.CASES,
    **bottleneck_family.CASES,
    **prompts.CASES,
    **adalora.CASES,
}
