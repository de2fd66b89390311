"""Attention layers: equal to torch's where torch has them, adaptable by PEFT methods, decoding as they trained."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import AttentionConfig, CrossAttention, KeyValueCache, LoraConfig, MultiHeadAttention
from fastpeft.layers.attention import alibi_slopes
from fastpeft.layers.masks import causal_mask, padding_mask, window_mask
from tests.saved_bytes import SavedBytes
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close, assert_no_worse

HIDDEN, HEADS = 24, 4


def layer(kind=MultiHeadAttention, **options):
    return kind(AttentionConfig(HIDDEN, HEADS, **options)).eval()


def draw(tokens=9, width=HIDDEN):
    return torch.randn(2, tokens, width)


def as_torch(ours, **options):
    """torch.nn.MultiheadAttention with the same weights."""
    theirs = nn.MultiheadAttention(HIDDEN, HEADS, bias=ours.config.bias, batch_first=True, **options)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        if theirs.in_proj_weight is not None:
            theirs.in_proj_weight.copy_(torch.cat([module.weight for module in projections]))
        else:
            for name, module in zip("qkv", projections):
                getattr(theirs, f"{name}_proj_weight").copy_(module.weight)
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        if ours.config.bias:
            theirs.in_proj_bias.copy_(torch.cat([module.bias for module in projections]))
            theirs.out_proj.bias.copy_(ours.o_proj.bias)
    return theirs.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch(causal, padded, bias):
    ours = layer(causal=causal, bias=bias, output_bias=bias)
    x = draw().requires_grad_()
    mask = padding_mask(torch.tensor([9, 6])) if padded else None
    got, weights = ours(x, key_padding_mask=mask, need_weights=True)
    expected, expected_weights = as_torch(ours)(
        x,
        x,
        x,
        key_padding_mask=None if mask is None else ~mask,
        attn_mask=~causal_mask(9) if causal else None,
        average_attn_weights=False,
    )
    assert_close("y", got, expected, OTHER_ORDER_OF_SUMS)
    assert_close("weights", weights, expected_weights, OTHER_ORDER_OF_SUMS)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
    assert_close("dx", *grads, OTHER_ORDER_OF_SUMS * 10)


def test_cross_attention_equals_torch():
    ours = layer(CrossAttention, memory_size=10)
    theirs = as_torch(ours, kdim=10, vdim=10)
    x, memory, mask = draw(), draw(5, 10), padding_mask(torch.tensor([5, 2]))
    expected, _ = theirs(x, memory, memory, key_padding_mask=~mask)
    assert_close("y", ours(x, memory, memory_padding_mask=mask), expected, OTHER_ORDER_OF_SUMS)


TERMS = {
    "rotary": {"use_rotary": True, "causal": True},
    "partial rotary": {"use_rotary": True, "rotary_dim": 4, "rotary_interleaved": True, "causal": True},
    "relative": {"use_relative_position": True, "causal": True},
    "alibi": {"use_alibi": True, "causal": True},
    "sinks": {"use_sinks": True, "causal": True},
    "window": {"window": 3, "causal": True, "num_kv_heads": 2},
    "softcap": {"softcap": 2.0, "causal": True, "num_kv_heads": 1},
}


@pytest.mark.parametrize("term", TERMS)
def test_decoding_with_a_cache_repeats_the_whole(term):
    module, x = layer(**TERMS[term]), draw(12)
    with torch.no_grad():
        whole = module(x)
        for sizes in ([12], [5, 1, 1, 5], [1] * 12):
            cache = KeyValueCache()
            parts = [module(part, cache=cache) for part in x.split(sizes, dim=1)]
            assert_close("y", torch.cat(parts, dim=1), whole, OTHER_ORDER_OF_SUMS)
            assert len(cache) == 12


@pytest.mark.parametrize("term", TERMS)
def test_the_fused_op_is_no_worse_than_the_reference(term):
    fused, x = layer(**TERMS[term]), draw(12)
    plain, exact = (layer(**TERMS[term], use_flash_attention=False) for _ in range(2))
    for other in (plain, exact):
        other.load_state_dict(fused.state_dict())
    with torch.no_grad():
        assert_no_worse("y", fused(x), exact.double()(x.double()), plain(x))


@pytest.mark.parametrize("term", ["rotary", "relative", "window"])
def test_packed_sequences_are_alone(term):
    module, lengths = layer(**TERMS[term]), [4, 1, 7]
    x = draw(12)[:1]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    alone = torch.cat([module(part) for part in x.split(lengths, dim=1)], dim=1)
    assert_close("y", module(x, cu_seqlens=cu), alone, OTHER_ORDER_OF_SUMS)


def test_a_memory_is_projected_once():
    module, x, memory = layer(CrossAttention), draw(3), draw(7)
    cache = KeyValueCache()
    with torch.no_grad():
        first = module(x, memory, cache=cache)
        assert_bits_equal("y", module(x, cache=cache), first)
    with pytest.raises(ValueError, match="expected memory"):
        module(x)


def test_cache_reorders_crops_and_refuses_another_batch():
    cache, k = KeyValueCache(), torch.randn(2, 3, 1, 4)
    cache.update(k, k + 1)
    cache.reorder(torch.tensor([1, 0]))
    assert_bits_equal("keys", cache.keys, k.flip(0))
    cache.crop(1)
    keys, values = cache.update(k[:, :1], k[:, :1])
    assert_bits_equal("keys", keys, torch.cat([k.flip(0)[:, :1], k[:, :1]], dim=1))
    assert values.shape == (2, 2, 1, 4)
    with pytest.raises(ValueError, match=r"B=2, S, 1, 4\].*\(3, 1, 1, 4\)"):
        cache.update(torch.zeros(3, 1, 1, 4), torch.zeros(3, 1, 1, 4))
    with pytest.raises(ValueError, match="0 to 2, got 5"):
        cache.crop(5)


def test_a_cache_carries_gradients():
    cache, k = KeyValueCache(), torch.randn(1, 2, 1, 4, requires_grad=True)
    cache.update(k, k)
    keys, _ = cache.update(k * 2, k)
    keys.sum().backward()
    assert_bits_equal("dk", k.grad, torch.full_like(k, 3.0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = layer(use_rotary=True, causal=True, num_kv_heads=2)
        self.cross_attn = layer(CrossAttention)

    def forward(self, x, memory):
        x = x + self.self_attn(x)
        return x + self.cross_attn(x, memory)


def test_lora_on_the_projections_trains():
    torch.manual_seed(3)
    x, memory, target = draw(), draw(5), draw()
    model = fastpeft.get_peft_model(
        Block(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    ).train()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 8
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        loss = (model(x, memory) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("term", ["rotary", "relative", "sinks"])
def test_saved_bytes_of_a_layer_grow_with_the_length(term):
    module = layer(**TERMS[term], max_position_embeddings=4096)

    def saved(tokens):
        with SavedBytes(module) as watch:
            y = module(torch.randn(1, tokens, HIDDEN))
            total = watch.total()
        del y
        return total

    assert saved(4096) <= 4 * saved(1024)


def test_dropout_only_while_training():
    module, x = layer(dropout=0.5), draw()
    assert_bits_equal("y", module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize(("heads", "first", "last"), [(8, 0.5, 2**-8), (12, 0.5, 2**-3.5)])
def test_alibi_slopes_are_those_of_the_paper(heads, first, last):
    slopes = alibi_slopes(heads)
    assert len(slopes) == heads
    assert slopes[0] == first
    assert slopes[-1].item() == pytest.approx(last)


def test_masks():
    assert window_mask(2, 4, left=1, right=0).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert causal_mask(3).sum() == 6
    assert padding_mask(torch.tensor([1, 3])).tolist() == [[True, False, False], [True] * 3]
    assert padding_mask(torch.tensor([1, 3]), 4, side="left").tolist() == [[False] * 3 + [True], [False] + [True] * 3]
    with pytest.raises(ValueError, match="left >= 0 or None, got -1"):
        window_mask(3, left=-1)
    with pytest.raises(ValueError, match="got 'top'"):
        padding_mask(torch.tensor([1]), side="top")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size >= 1, got 0"),
        ({"num_heads": 5}, "divide hidden_size=24, got 5"),
        ({"num_kv_heads": 3}, "divide num_heads=4, got 3"),
        ({"dropout": 1.0}, "0 <= dropout < 1, got 1.0"),
        ({"softcap": 0.0}, "softcap > 0"),
        ({"window": (-1, 0)}, r"got \(-1, 0\)"),
        ({"window": 3}, "causal=True with window=3"),
        ({"use_rotary": True, "rotary_dim": 8}, "even rotary_dim of 2 to head_dim=6, got 8"),
        ({"use_rotary": True, "use_relative_position": True}, "got both"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**{"hidden_size": HIDDEN, "num_heads": HEADS} | options)


def test_a_memory_has_no_place():
    with pytest.raises(ValueError, match="use_rotary=True"):
        layer(CrossAttention, use_rotary=True)
