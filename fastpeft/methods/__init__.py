"""One file is one PEFT method: a config dataclass and the modules it puts into a model.

METHODS maps the `peft_type` of an adapter_config.json to the config class. A new method is a file and a row here.
"""

from fastpeft.methods.adalora import AdaLoraConfig
from fastpeft.methods.bitfit import BitFitConfig
from fastpeft.methods.boft import BOFTConfig
from fastpeft.methods.bottleneck import BottleneckConfig
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.fusion import FusionConfig
from fastpeft.methods.ia3 import IA3Config
from fastpeft.methods.layernorm_tuning import LNTuningConfig
from fastpeft.methods.lora import LoraConfig
from fastpeft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from fastpeft.methods.oft import OFTConfig
from fastpeft.methods.p_tuning import PromptEncoderConfig
from fastpeft.methods.prefix_tuning import PrefixTuningConfig
from fastpeft.methods.prompt_tuning import PromptTuningConfig

METHODS: dict[str, type[PeftConfig]] = {
    "ADALORA": AdaLoraConfig,
    "BITFIT": BitFitConfig,
    "BOFT": BOFTConfig,
    "BOTTLENECK": BottleneckConfig,
    "FUSION": FusionConfig,
    "IA3": IA3Config,
    "LN_TUNING": LNTuningConfig,
    "LORA": LoraConfig,
    "MULTITASK_PROMPT_TUNING": MultitaskPromptTuningConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "P_TUNING": PromptEncoderConfig,
    "OFT": OFTConfig,
}


def config_from_dict(values: dict) -> PeftConfig:
    """The config of an adapter_config.json's content.

    Raises:  ValueError without peft_type; NotImplementedError for a method that is not in METHODS
    """
    kind = values.get("peft_type")
    if kind is None:
        raise ValueError("adapter_config.json: expected a field peft_type, got none; is this an adapter's folder?")
    if not isinstance(kind, str) or kind not in METHODS:
        raise NotImplementedError(
            f"adapter_config.json: peft_type {kind!r} is not one of {sorted(METHODS)}; load it with peft"
        )
    return METHODS[kind].from_dict(values)
