"""The backward of attention: dq with delta first, then dk with dv, then what a broadcast bias still lacks. No atomics."""

from typing import NamedTuple

import torch

from fastpeft.kernels.attention_call import AttentionCall, empty_aligned
from fastpeft.kernels.attention_dbias import attention_dbias
from fastpeft.kernels.attention_dkdv import attention_dkdv
from fastpeft.kernels.attention_dq import attention_dq
from fastpeft.kernels.attention_scores import LOG2E


class AttentionGrads(NamedTuple):
    """None where not asked for; ddistances and dsinks in float32."""

    dq: torch.Tensor
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    dbias: torch.Tensor | None
    ddistances: torch.Tensor | None
    dsinks: torch.Tensor | None


def attention_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    *,
    with_keys: bool,
    bias_shape: tuple[int, int, int, int] | None,
    with_distances: bool,
    with_sinks: bool,
    precision: str,
) -> AttentionGrads:
    """The gradients of q [B, Sq, H, D], of k and v, of a bias of `bias_shape`, of `call.distances` and of `call.sinks`."""
    (batch, sq, heads, _), sk = q.shape, k.shape[1]
    dbias = None
    if bias_shape == (batch, heads, sq, sk):
        dbias = empty_aligned(bias_shape, call.bias.dtype, q.device)
        if call.skips_tiles:
            dbias.zero_()
    dq, delta, ddistances = attention_dq(
        q, k, v, o, do, lse, call, dbias=dbias, with_distances=with_distances, precision=precision
    )
    dk = dv = dsinks = None
    if with_keys:
        dk, dv = attention_dkdv(q, k, v, do, lse, delta, call, precision=precision)
    if bias_shape is not None and dbias is None:
        dbias = attention_dbias(q, k, v, do, lse, delta, call, shape=bias_shape, precision=precision)
    if with_sinks:  # the sink's weight has no value: its gradient is -p_sink * delta
        # delta has no more rows than tiles; in float64, since the sums cancel and are few
        share = torch.exp2(call.sinks.double()[:, None] * LOG2E.value - lse[..., :sq])
        dsinks = -(share * delta[..., :sq]).sum((0, 2)).float()
    return AttentionGrads(dq, dk, dv, dbias, ddistances, dsinks)
