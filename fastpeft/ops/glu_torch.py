"""Gated linear units by library calls: what a CPU runs, and any device on request. Equations: glu.py.

Results have the bits of the eager code in the same dtype: act(gate) is rounded, then multiplied.

Measured at [1024, 1536], one thread of a Zen 4 core (AVX512, no AMX), ms of CPU time of forward and backward:

| | bfloat16 silu, gelu, gelu_tanh | float32 silu, gelu, gelu_tanh | kept for backward |
|---|---|---|---|
| F.silu(gate) * up | 3.0, 3.0, 7.3 | 3.4, 4.0, 8.3 | gate, up, act(gate) |
| native act and its native gradient, act computed again | 4.8, 3.8, 10.4 | 4.4, 4.4, 9.9 | gate, up |
| the same in parts of 2^18 elements | 4.2, 4.4, 10.7 | 3.7, 5.1, 10.1 | gate, up |
| autograd over the eager code, run again in backward | 5.3, 4.3, 11.1 | 5.6, 6.9, 16.1 | gate, up |

The second is below: of those that keep two tensors no other is faster throughout. A product of [1024, 576] and [1536, 576]
beside it takes 8.8 ms in bfloat16 and 19.8 in float32.
"""

import torch

GIVES_H = False
"""Whether there is backward_and_h: h again for nothing, in the pass that computes dgate and dup. Here: forward_and_act."""

_aten = torch.ops.aten
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def forward(gate, up, activation, out=None):
    """h = act(gate) * up, in a fresh contiguous tensor or in `out`, which may be `up` or `gate` itself."""
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    elif out is up:
        return out.mul_(_act(gate, activation, torch.empty_like(gate)))
    return _act(gate, activation, out).mul_(up)


def forward_and_act(gate, up, activation):
    """(h, act(gate)) in fresh tensors: for who takes `backward` next."""
    act = _act(gate, activation, torch.empty_like(gate))
    return act * up, act


def backward(dh, gate, up, activation, need_gate=True, need_up=True, out_gate=None, out_up=None, act=None):
    """(dgate, dup), each None if not needed, in fresh tensors or in out_gate, which may be dh itself, and out_up.

    up is None where need_gate is False. act: act(gate) where it is there already; dup takes its memory.
    """
    dgate = dup = None
    if act is not None:
        dup = act.mul_(dh)
    elif need_up:
        dup = torch.empty(dh.shape, dtype=dh.dtype, device=dh.device) if out_up is None else out_up
        _act(gate, activation, dup).mul_(dh)
    if need_gate:
        dgate = torch.empty(dh.shape, dtype=dh.dtype, device=dh.device) if out_gate is None else out_gate
        torch.mul(dh, up, out=dgate)
        _act_backward(dgate, gate, activation)
    return dgate, dup


def _act(g, activation, out):
    if activation == "silu":
        return _aten.silu.out(g, out=out)
    return _aten.gelu.out(g, approximate=APPROXIMATE[activation], out=out)


def _act_backward(d, g, activation):
    """d *= act'(g) in place."""
    if activation == "silu":
        return _aten.silu_backward.grad_input(d, g, grad_input=d)
    return _aten.gelu_backward.grad_input(d, g, approximate=APPROXIMATE[activation], grad_input=d)
