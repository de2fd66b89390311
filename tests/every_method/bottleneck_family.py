"""Bottleneck adapters. A fusion needs two of them first: tests/methods/test_fusion.py."""

from tests.every_method.method_case import MethodCase

_OURS = {"in_peft": False, "mergeable": False, "learning_rate": 2e-2}

CASES = {
    "bottleneck_pfeiffer": MethodCase("BottleneckConfig", {"bottleneck_size": 8}, **_OURS),
    "bottleneck_houlsby": MethodCase(
        "BottleneckConfig",
        {
            "placement": "houlsby",
            "bottleneck_size": 8,
            "non_linearity": "gelu_new",
            "init_weights": "houlsby",
            "layer_norm": True,
        },
        identity=False,  # near it
        **_OURS,
    ),
    "bottleneck_parallel": MethodCase(
        "BottleneckConfig", {"placement": "parallel", "reduction_factor": 8, "scaling": 4.0}, **_OURS
    ),
}
