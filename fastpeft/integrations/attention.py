"""fastpeft's attention as an implementation of transformers: attn_implementation="fastpeft".

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastpeft")
    model.set_attn_implementation("fastpeft")

Two functions are registered under that name. Without the one that makes masks, transformers would hand over none, not even for
padded rows. A mask arrives in one of three forms:

    None            causal or not as the module says, aligned at the last query and key; sliding_window as the module says
    [B, Sk] bool    the same, and padding: True = attend. Nothing of Sq * Sk elements is made
    4 dimensions    all there is to say about who sees whom, boolean or added to the scores: packed sequences, chunks, images,
                    caches of a fixed size, a user's own mask, and padding of bidirectional layers as [B, 1, 1, Sk]

A query that sees no key gives zeros, where eager attention gives the mean of all values: rows of padding, which nobody reads.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fastpeft.ops.attention import attention
from fastpeft.ops.tracing import traced
from fastpeft.reference import attention as reference

NAME = "fastpeft"
_WINDOW_PARTS = {"sliding_window_overlay", "causal_mask_function"}
_PACKED_PARTS = {"remap_positions_for_packed_sequence", "packed_sequence_mask_function"}


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options,
) -> torch.Tensor | None:
    """The mask that `fastpeft_attention` is to get, in its smallest form: see the module's docstring."""
    offsets = (q_offset, kv_offset, q_length, kv_length)
    aligned = all(isinstance(number, int) for number in offsets) and q_offset + q_length == kv_offset + kv_length
    padding = attention_mask
    if padding is not None and padding.dim() == 2 and aligned:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if padding.shape[1] == kv_length:
            padding = None if not traced(padding) and bool(padding.all()) else padding.bool()
            if mask_function is bidirectional_mask_function and padding is not None:
                return padding[:, None, None, :]
            if allow_is_causal_skip and _is_causal(mask_function):
                return padding
    elif padding is None and aligned and allow_is_causal_skip and _is_causal(mask_function):
        return None
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **options,
    )
    positions = _packed_positions(mask_function) if attention_mask is None and aligned else None
    packed = _packed(positions, batch_size, q_length)
    if packed is not None:
        _OF_MASK[mask] = packed
    return mask


# What a mask says, by the tensor itself: another tensor of the same values is read as any mask of four dimensions.
_OF_MASK: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _parts(mask_function) -> list:
    """What a function made by transformers' mask functions is made of."""
    return [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]


def _joined(mask_function) -> dict[str, Callable]:
    """The functions, by name, whose intersection `mask_function` is; empty if it is no intersection."""
    parts = _parts(mask_function)
    if len(parts) == 1 and isinstance(parts[0], tuple):
        return {getattr(part, "__qualname__", "").removesuffix(".<locals>.inner_mask"): part for part in parts[0]}
    return {}


def _is_causal(mask_function) -> bool:
    """Is this transformers' causal function, or that of a sliding causal window?"""
    return mask_function is causal_mask_function or set(_joined(mask_function)) == _WINDOW_PARTS


def _packed_positions(mask_function) -> torch.Tensor | None:
    """position_ids where a function is causal within packed sequences, and nothing else."""
    joined = _joined(mask_function)
    if set(joined) != _PACKED_PARTS:
        return None
    inner, positions = None, None
    for part in _parts(joined["remap_positions_for_packed_sequence"]):
        inner, positions = (inner, part) if isinstance(part, torch.Tensor) else (part, positions)
    return positions if _is_causal(inner) else None


def fastpeft_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(o [B, Sq, H, D], weights) for query [B, H, Sq, D], key and value [B, Hkv, Sk, D], as transformers calls it.

    weights [B, H, Sq, Sk], before dropout, where the model hands output_attentions=True on, else None.

    Packed sequences are found from position_ids where there is no mask, with a cache that was empty too, or given as
    cu_seq_lens_q and cu_seq_lens_k.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    batch, sq, sk = q.shape[0], q.shape[1], k.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    terms = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    bias, packed = position_bias, None
    if attention_mask is not None and attention_mask.dim() == 4:
        packed = None if torch.compiler.is_compiling() or bias is not None else _OF_MASK.get(attention_mask)
        causal = packed is not None
        if causal:
            pass
        elif attention_mask.dtype == torch.bool and attention_mask.shape[1] == attention_mask.shape[2] == 1:
            terms["key_padding_mask"] = attention_mask[:, 0, 0].expand(batch, sk)
        else:
            bias = _added(position_bias, attention_mask, q.dtype)
    elif attention_mask is not None:
        terms["key_padding_mask"] = attention_mask[:, -sk:].bool()
    elif causal and bias is None and sq == sk:
        packed = (cu_seq_lens_q, cu_seq_lens_k) if cu_seq_lens_q is not None else _packed(position_ids, batch, sq)
    if causal and sliding_window is not None:
        terms["window"] = sliding_window - 1
    if packed is not None:
        terms["cu_seqlens_q"], terms["cu_seqlens_k"] = (part.to(torch.int32) for part in packed)
        q, k, v = (tensor.reshape(1, batch * sq, *tensor.shape[2:]) for tensor in (q, k, v))
    width = v.shape[3]
    if width != k.shape[3]:  # heads of values that are narrower than those of keys, or wider
        widest = max(width, k.shape[3])
        terms["scale"] = q.shape[3] ** -0.5 if scaling is None else scaling
        q, k, v = (nn.functional.pad(tensor, (0, widest - tensor.shape[3])) for tensor in (q, k, v))
    o = attention(q, k, v, causal=causal, bias=bias, **terms)[..., :width]
    weights = _weights(q, k, batch, causal=causal, bias=bias, **terms) if kwargs.get("output_attentions") else None
    return o.reshape(batch, sq, *o.shape[2:]).contiguous(), weights


def _weights(q, k, batch, *, dropout_p, **terms):
    """[B, H, Sq, Sk] by the specification; of packed rows each row's own."""
    weights = reference.weights(q, k, **terms).to(q.dtype)
    if q.shape[0] == batch:
        return weights
    by_row = weights[0].unflatten(2, (batch, -1)).unflatten(1, (batch, -1))  # [H, B, Sq, B, Sq]
    return by_row.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)


# A boolean mask as a bias, so that all layers share one: (dtype, version of the mask, bias).
_BIASES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _added(position_bias, mask, dtype):
    """One bias for both: a hidden pair is -inf."""
    if mask.dtype == torch.bool:
        if position_bias is None:
            tracing = torch.compiler.is_compiling() or mask.is_inference()
            state = None if tracing else (dtype, mask._version)
            known = None if tracing else _BIASES.get(mask)
            if known is not None and known[0] == state:
                return known[1]
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
            if not tracing:
                _BIASES[mask] = (state, bias)
            return bias
        return torch.where(mask, position_bias, float("-inf"))
    return mask if position_bias is None else position_bias + mask


# Reading position_ids waits for the device, so they are read once a forward pass, not once a layer.
_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _packed(position_ids, batch, tokens):
    """(cu_seqlens, the same) of the sequences that position_ids [B or 1, S] pack into rows; None where each row is one."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != tokens or tokens < 2:
        return None
    if traced(position_ids) or position_ids.shape[0] not in (1, batch):
        return None
    state = (batch, None if position_ids.is_inference() else position_ids._version)
    known = _PACKED.get(position_ids)
    if known is None or state[1] is None or known[0] != state:
        breaks = position_ids.diff(dim=1) != 1
        cu = None
        if bool(breaks.any()):
            first = torch.ones(breaks.shape[0], 1, dtype=torch.bool, device=breaks.device)
            starts = torch.cat([first, breaks], dim=1).expand(batch, -1).reshape(-1).nonzero()[:, 0]
            cu = torch.cat([starts, starts.new_tensor([batch * tokens])]).to(torch.int32)
        known = _PACKED[position_ids] = (state, cu)
    return None if known[1] is None else (known[1], known[1])


def register() -> None:
    """Make attn_implementation="fastpeft" known to transformers; done when this module is imported."""
    AttentionInterface.register(NAME, fastpeft_attention)
    AttentionMaskInterface.register(NAME, attention_mask)


register()
