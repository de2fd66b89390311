"""Positional modules against transformers' and the papers' formulas."""

import pytest
import torch
from transformers import LlamaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from fastpeft import (
    LearnedPositionalEmbedding,
    RelativePositionBias,
    RopeScaling,
    RotaryEmbedding,
    SinusoidalPositionalEmbedding,
)
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

HEAD_DIM, PRETRAINED = 24, 40
HALF = HEAD_DIM // 2
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
        "original_max_position_embeddings": 30,
        "factor": 4.0,
    },
}


def draw(tokens):
    return torch.randn(2, tokens, 4, HEAD_DIM), torch.randn(2, tokens, 2, HEAD_DIM)


@pytest.mark.parametrize("tokens", [20, 35, 55])
@pytest.mark.parametrize("kind", SCALINGS)
def test_equals_the_rotary_embedding_of_a_llama(kind, tokens):
    parameters = {"rope_type": kind, "rope_theta": 5000.0} | SCALINGS[kind]
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=PRETRAINED, rope_parameters=parameters
    )
    q, k = draw(tokens)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(tokens)[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    module = RotaryEmbedding(HEAD_DIM, PRETRAINED, base=5000.0, scaling=config.rope_parameters)
    for _ in range(2):
        for got, wanted in zip(module(q, k), expected):
            assert_close(kind, got, wanted, OTHER_ORDER_OF_SUMS)
        module(*draw(50))  # another length in between
    assert not module.state_dict()


def test_decoding_continues_where_the_prompt_ended():
    module = RotaryEmbedding(HEAD_DIM, 8)
    q, k = draw(21)
    whole = module(q, k)
    for start, stop in ((0, 20), (20, 21)):
        for got, wanted in zip(module(q[:, start:stop], k[:, start:stop], offset=start), whole):
            assert_bits_equal("part", got, wanted[:, start:stop])
    positions = torch.arange(21).flip(0)[None]
    assert_bits_equal("reversed", module(q.flip(1), positions=positions)[0].flip(1), whole[0])


def test_tables_stay_float32_in_a_bfloat16_model():
    module, q = RotaryEmbedding(HEAD_DIM).bfloat16(), draw(9)[0].bfloat16()
    assert_bits_equal("q", module(q)[0], RotaryEmbedding(HEAD_DIM)(q)[0])


def test_sinusoids_are_those_of_the_paper():
    got = SinusoidalPositionalEmbedding(10)(torch.tensor([[0, 3, 70]]))
    for p, row in zip((0, 3, 70), got[0]):
        angles = torch.tensor([p / 10000 ** (2 * i / 10) for i in range(5)], dtype=torch.float64)
        assert_close("sin", row[0::2], angles.sin(), 10 * OTHER_ORDER_OF_SUMS)
        assert_close("cos", row[1::2], angles.cos(), 10 * OTHER_ORDER_OF_SUMS)


def test_learned_positions_are_trained_and_bounded():
    module = LearnedPositionalEmbedding(8, 5)
    module(torch.tensor([[0, 7]])).sum().backward()
    assert module.weight.grad[[0, 7]].abs().min() > 0
    with pytest.raises(ValueError, match="positions below 8, got 8"):
        module(torch.tensor([8]))


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(40, 40), (1, 33), (7, 200)])
def test_relative_bias_is_that_of_t5(decoder, sq, sk):
    config = T5Config(d_model=32, d_kv=8, num_heads=4, is_decoder=decoder)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = RelativePositionBias(4, bidirectional=not decoder)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    assert_bits_equal("bias", ours(sq, sk), theirs.compute_bias(sq, sk, past_seen_tokens=sk - sq))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryEmbedding(7), "even rotary_dim"),
        (lambda: RotaryEmbedding(8, 0), "max_position_embeddings >= 1, got 0"),
        (lambda: RotaryEmbedding(8, scaling=RopeScaling("yarn", factor=-1.0)), "factor > 0, got -1"),
        (lambda: SinusoidalPositionalEmbedding(5), "even dim >= 2, got 5"),
        (lambda: RelativePositionBias(4, 1), "2 buckets a side"),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
