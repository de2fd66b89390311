"""Frequencies of every scaling have the bits of transformers' for the same config."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastpeft.ops.rope_tables import RopeScaling, cos_sin, inverse_frequencies
from tests.tolerance import assert_bits_equal

HEAD_DIM = 24
HALF = HEAD_DIM // 2
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.5},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "factor": 16.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn-untruncated": {"factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    "yarn-given": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)], "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
        "original_max_position_embeddings": 64, "factor": 4.0,
    },
    "longrope-given": {
        "short_factor": [1.0] * HALF, "long_factor": [3.0] * HALF, "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
    },
}  # fmt: skip


def config_of(name, partial=1.0):
    kind = name.split("-")[0]
    parameters = {"rope_type": kind, "rope_theta": 5000.0, "partial_rotary_factor": partial} | SCALINGS.get(name, {})
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM, num_attention_heads=2, max_position_embeddings=256, rope_parameters=parameters
    )


@pytest.mark.parametrize("tokens", [None, 16, 300, 1000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name, tokens):
    config = config_of(name)
    kind = config.rope_parameters["rope_type"]
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=tokens)
    got, factor = inverse_frequencies(
        HEAD_DIM,
        base=5000.0,
        scaling=RopeScaling.from_parameters(config.rope_parameters),
        max_position_embeddings=256,
        tokens=tokens,
    )
    assert_bits_equal("inv_freq", got, expected)
    assert factor == expected_factor


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3", "dynamic"])
def test_partial_rotation(name):
    config = config_of(name, partial=0.5)
    expected, _ = ROPE_INIT_FUNCTIONS[name](config)
    scaling = RopeScaling.from_parameters(config.rope_parameters)
    got, _ = inverse_frequencies(HALF, base=5000.0, scaling=scaling, max_position_embeddings=256)
    assert_bits_equal("inv_freq", got, expected)


@pytest.mark.parametrize("name", ["default", *SCALINGS])
def test_cos_and_sin_equal_those_of_a_llama(name):
    config = config_of(name)
    module = LlamaRotaryEmbedding(config)
    positions = torch.arange(60)[None]
    expected = module(torch.zeros(1), positions)
    scaling = RopeScaling.from_parameters(config.rope_parameters)
    inv_freq, factor = inverse_frequencies(
        HEAD_DIM, base=5000.0, scaling=scaling, max_position_embeddings=256, tokens=60
    )
    for label, got, wanted in zip(("cos", "sin"), cos_sin(inv_freq, positions, factor), expected):
        assert_bits_equal(label, got, wanted[..., :HALF])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RopeScaling("ntk"), "rope_type among .*'ntk'"),
        (lambda: RopeScaling("linear"), "expected factor for rope_type 'linear'"),
        (lambda: RopeScaling("linear", factor=0.0), "factor > 0, got 0.0"),
        (lambda: inverse_frequencies(7), "even rotary_dim > 0, got 7"),
        (
            lambda: inverse_frequencies(8, scaling=RopeScaling("longrope", short_factor=[1.0], long_factor=[1.0])),
            "expected 4 longrope factors",
        ),
    ],
)
def test_bad_scaling(call, message):
    with pytest.raises(ValueError, match=message):
        call()
