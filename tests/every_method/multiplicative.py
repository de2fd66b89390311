"""Methods that scale or rotate what flows through a module, and those that train the base's own small parameters."""

from tests.every_method.method_case import MethodCase

EVERY = ("llama", "gpt2", "bert", "t5")
ALL_LINEAR = {"target_modules": "all-linear"}


def _oft(**options) -> MethodCase:
    """peft's OFT and BOFT refuse Conv1D, so GPT-2."""
    learning_rate = options.pop("learning_rate", 3e-2)
    return MethodCase(
        "OFTConfig",
        ALL_LINEAR | {"oft_block_size": 8} | options,
        not_in_peft_on=("gpt2",),
        learning_rate=learning_rate,
        fill_std=0.05,
    )


CASES = {
    "ia3": MethodCase("IA3Config", learning_rate=1e-1, steps=60),
    "ia3_all_output": MethodCase(
        "IA3Config", ALL_LINEAR | {"feedforward_modules": []}, models=("llama", "bert"), learning_rate=1e-1
    ),
    "oft": _oft(),
    "oft_number": _oft(r=4, oft_block_size=0),
    "oft_share": _oft(block_share=True),
    "oft_coft": _oft(coft=True, eps=2.0),
    "oft_coft_share": _oft(coft=True, eps=0.8, block_share=True),
    "oft_exact": _oft(use_cayley_neumann=False),
    "oft_exact_coft_share": _oft(use_cayley_neumann=False, coft=True, eps=0.8, block_share=True),
    "oft_four_terms": _oft(num_cayley_neumann_terms=4),
    "boft": MethodCase("BOFTConfig", ALL_LINEAR, not_in_peft_on=("gpt2",), learning_rate=3e-2),
    "boft_number": MethodCase(
        "BOFTConfig",
        ALL_LINEAR | {"boft_block_size": 0, "boft_block_num": 8},
        not_in_peft_on=("gpt2",),
        learning_rate=3e-2,
    ),
    "boft_butterfly": MethodCase(  # peft takes one factor where its CUDA extension is missing
        "BOFTConfig", ALL_LINEAR | {"boft_n_butterfly_factor": 2}, not_in_peft_on=EVERY, learning_rate=3e-2
    ),
    "ln_tuning": MethodCase("LNTuningConfig", models=("llama", "gpt2", "t5"), learning_rate=1e-1, steps=60),
    "ln_tuning_bert": MethodCase("LNTuningConfig", {"target_modules": ["LayerNorm"]}, models=("bert",)),
    "bitfit": MethodCase("BitFitConfig", models=("gpt2", "bert"), in_peft=False, learning_rate=5e-2),
    "bitfit_norms": MethodCase("BitFitConfig", {"train_layernorm": True}, in_peft=False, learning_rate=1e-1, steps=60),
}
