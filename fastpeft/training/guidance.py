"""Learning rates to start from, by method and size of the model. Where a run names none, the engine takes one from here."""

LARGE = float("inf")
RATES: dict[str, tuple[tuple[float, float], ...]] = {
    "LORA": ((3e9, 3e-4), (2e10, 2e-4), (LARGE, 1e-4)),
    "ADALORA": ((3e9, 1e-3), (2e10, 5e-4), (LARGE, 2e-4)),
    "PROMPT_TUNING": ((3e9, 3e-2), (LARGE, 1e-2)),
    "MULTITASK_PROMPT_TUNING": ((3e9, 3e-2), (LARGE, 1e-2)),
    "P_TUNING": ((LARGE, 1e-3),),
    "PREFIX_TUNING": ((3e9, 1e-2), (LARGE, 5e-3)),
    "IA3": ((1e9, 8e-3), (LARGE, 3e-3)),
    "BITFIT": ((3e9, 1e-3), (LARGE, 4e-4)),
    "LN_TUNING": ((3e9, 1e-3), (LARGE, 4e-4)),
    "OFT": ((3e9, 4e-4), (LARGE, 1e-4)),
    "BOFT": ((3e9, 4e-4), (LARGE, 1e-4)),
    "BOTTLENECK": ((3e9, 1e-3), (LARGE, 1e-4)),
    "FUSION": ((LARGE, 5e-5),),
}
"""peft_type -> (models up to so many parameters, learning rate), from small to large."""
UNKNOWN = ((3e9, 3e-4), (LARGE, 1e-4))
"""For a method without a row: cautious, since nothing is known of it."""


def suggested_learning_rate(method: str, parameters: int) -> float:
    """Where to start for a method (its peft_type, letter case aside) on a model of so many parameters, under AdamW.

    Units:   parameters of the whole model; the rate per step, after the warm-up
    Sources: LoRA: Hu et al. 2021 (arXiv:2106.09685), appendix D, 2e-4 to 5e-4 for RoBERTa to GPT-3; Dettmers et al. 2023
             (arXiv:2305.14314), 2e-4 up to 13 B, 1e-4 above. Adapters: Houlsby et al. 2019 (arXiv:1902.00751), 3e-5 to 3e-3;
             Pfeiffer et al. 2021 (arXiv:2005.00247), 1e-4, and 5e-5 for the fusion. IA3: Liu et al. 2022 (arXiv:2205.05638),
             3e-3 on T0-3B. BitFit: Ben Zaken et al. 2022 (arXiv:2106.10199), 1e-4 to 1e-3. Prompts: Lester et al. 2021
             (arXiv:2104.08691) take 0.3 with Adafactor's relative steps; under AdamW a tenth of it; Liu et al. 2022
             (arXiv:2110.07602), 5e-3 to 1e-2 for prefixes. The others are cut from their nearest relative: rotations (OFT, BOFT)
             from LoRA, norms from biases. They are starting points, not optima.
    Raises:  ValueError for a number of parameters below 1
    """
    if parameters < 1:
        raise ValueError(f"suggested_learning_rate: expected at least 1 parameter, got {parameters}")
    rows = RATES.get(str(getattr(method, "value", method)).upper(), UNKNOWN)
    return next(rate for limit, rate in rows if parameters <= limit)
