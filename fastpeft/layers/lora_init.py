"""How A and B of a LoRA begin, by LoraConfig.init_lora_weights.

    True          A Kaiming-uniform, B = 0                                    the function of the base is unchanged
    False         both Kaiming-uniform
    "gaussian"    A ~ N(0, 1/r^2), B = 0                                      unchanged
    "orthogonal"  rows of A and columns of B from halves of one random rotation: B A = 0         unchanged (r even)
    "eva"         as True until initialize_lora_eva_weights gives A           unchanged
    "pissa"       B A s = the leading r singular triples of W,  base W - s B A                    unchanged up to rounding
    "pissa_niter_[n]"  the same by n subspace iterations (Halko et al. 2011) instead of a full decomposition
    "olora"       B A = the leading r columns and rows of W = Q R,  base W - s B A                unchanged up to rounding
    "loftq"       base Q = quantised(W - s B A), s B A = the leading r singular triples of W - Q, by turns

The last four act on another weight than the base's own; it is the adapter's, and stands in the base while the adapter acts.
Both are kept, which costs a second copy of the adapted weights. PEFT keeps only the changed one: there an adapter that is off,
deleted, or beside another leaves the base changed; files are the same, as loading computes the start again.

Source:  Hu et al. 2021, arXiv:2106.09685; Meng et al. 2024, arXiv:2404.02948 (PiSSA); Buyukakyuz 2024, arXiv:2406.01775
         (OLoRA); Li et al. 2023, arXiv:2310.08659 (LoftQ); Paischer et al. 2024, arXiv:2410.07170 (EVA)
"""

import math
import re

import torch
from torch import nn

from fastpeft.layers.base_weight import BaseParameters, is_conv1d, is_quantized
from fastpeft.ops.int8 import quantize_int8
from fastpeft.ops.nf4 import quantize_4bit

InitLoraWeights = bool | str

INITIALISATIONS = ("gaussian", "orthogonal", "eva", "pissa", "olora", "loftq")
"""The names that init_lora_weights may be, beside True, False and "pissa_niter_[n]"."""

LOFTQ_BLOCKSIZE = 64
_NITER = re.compile(r"pissa_niter_(\d+)")


def check_init(where: str, kind: InitLoraWeights, r: int) -> None:
    """Raise NotImplementedError for an initialisation that is not here, ValueError for a rank that it cannot have."""
    known = isinstance(kind, bool) or (isinstance(kind, str) and (kind in INITIALISATIONS or _NITER.fullmatch(kind)))
    if not known:
        raise NotImplementedError(
            f"{where}: expected init_lora_weights True, False, 'pissa_niter_[n]' or one of {INITIALISATIONS}, got {kind!r}"
        )
    if kind == "orthogonal" and r % 2:
        raise ValueError(f"{where}: expected an even rank for init_lora_weights='orthogonal', got r={r}")


def check_loftq(where: str, options: dict) -> tuple[int, int]:
    """(bits, turns) of a loftq_config."""
    bits, turns = options.get("loftq_bits", 4), options.get("loftq_iter", 1)
    unknown = sorted(set(options) - {"loftq_bits", "loftq_iter"})
    if bits not in (4, 8) or not isinstance(turns, int) or turns < 1 or unknown:
        raise ValueError(
            f"{where}: expected loftq_config with loftq_bits 4 or 8 and loftq_iter at least 1, got {options!r}"
        )
    return bits, turns


def changes_base(kind: InitLoraWeights) -> bool:
    """True if the adapter acts on another weight than the base's own."""
    return isinstance(kind, str) and kind.startswith(("pissa", "olora", "loftq"))


@torch.no_grad()
def initialise(
    base_layer: nn.Module, a: nn.Linear, b: nn.Linear, kind: InitLoraWeights, scale: float, loftq_config: dict
) -> BaseParameters | None:
    """Fill A [r, K] and B [N, r], which nn.Linear has drawn, and give the parameters that they act on, if not the base's own.

    Raises:  ValueError for a rank above min(N, K), a scale that is not positive, or a weight that is not finite, where the
             weight is decomposed; NotImplementedError over a quantised base that cannot be started from
    """
    r = a.weight.shape[0]
    check_init("init_lora_weights", kind, r)
    if kind is False:
        return None
    if changes_base(kind):
        return _from_weight(base_layer, a, b, kind, scale, loftq_config)
    if kind == "orthogonal":
        _orthogonal(a.weight, b.weight)
        return None
    if kind == "gaussian":
        nn.init.normal_(a.weight, std=1 / r)
    elif kind is True:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    nn.init.zeros_(b.weight)
    if b.bias is not None:
        nn.init.zeros_(b.bias)
    return None


def _orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """A = (x q_odd)^T / 10, B = y q_even / 10 with random x, y: the halves of a rotation are orthogonal, so B A = 0."""
    r = a.shape[0]
    rotation, _ = torch.linalg.qr(torch.randn(r, r))
    odd, even = rotation[0::2], rotation[1::2]
    a.copy_((torch.randn(a.shape[1], r // 2) @ odd).t() / 10.0)
    b.copy_(torch.randn(r // 2, b.shape[0]).t() @ even / 10.0)


def _from_weight(base_layer, a, b, kind, scale, loftq_config) -> BaseParameters:
    own = BaseParameters.of(base_layer)
    fan_in_fan_out = is_conv1d(base_layer)
    dense = own.dense()
    w = (dense.t() if fan_in_fan_out else dense).to(torch.promote_types(dense.dtype, torch.float32))
    _check_decomposable(base_layer, w, kind, a.weight.shape[0], scale)
    if kind == "loftq":
        new_a, new_b, changed = loftq(w, a.weight.shape[0], scale, *check_loftq("LoraConfig", loftq_config))
    else:
        new_a, new_b = (
            olora(w, a.weight.shape[0], scale) if kind == "olora" else pissa(w, a.weight.shape[0], scale, kind)
        )
        changed = w - (scale * new_b) @ new_a
    a.weight.copy_(new_a)
    b.weight.copy_(new_b)
    changed = changed.to(dense.dtype)
    return own.with_values((changed.t() if fan_in_fan_out else changed).contiguous(), None)


def _check_decomposable(base_layer: nn.Module, w: torch.Tensor, kind: str, r: int, scale: float) -> None:
    where = f"init_lora_weights={kind!r}"
    if is_quantized(base_layer) and kind != "olora":
        raise NotImplementedError(
            f"{where}: expected a base with full weights, got {type(base_layer).__name__}; for a quantised one take "
            "replace_lora_weights_loftq, or 'olora'"
        )
    if w.is_meta:
        raise ValueError(f"{where}: expected a weight with data, got one on the meta device; load the model first")
    if r > min(w.shape):
        raise ValueError(f"{where}: expected a rank of at most {min(w.shape)} for a weight {tuple(w.shape)}, got r={r}")
    if not scale > 0:
        raise ValueError(f"{where}: expected a scale alpha / r above 0, got {scale}")
    if not bool(w.isfinite().all()):
        raise ValueError(f"{where}: expected a finite weight {tuple(w.shape)}, got one with infinities or NaN")


def pissa(w: torch.Tensor, r: int, scale: float, kind: str = "pissa") -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with s B A = sum of the leading r singular triples of w [N, K], shared evenly.

    "pissa_niter_[n]" draws its starting vectors from a seed of its own: loading repeats what training started from.
    """
    iterations = _NITER.fullmatch(kind)
    if iterations is None:
        u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
        u, sigma, vh = u[:, :r], sigma[:r], vh[:r]
    else:
        with torch.random.fork_rng(devices=[w.device] if w.is_cuda else []):
            torch.manual_seed(0)
            u, sigma, v = torch.svd_lowrank(w, r, niter=int(iterations[1]))
        vh = v.t()
    root = (sigma / scale).sqrt()
    return root[:, None] * vh, u * root


def olora(w: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) = the leading r rows of R and columns of Q, w = Q R; their product is not divided by the scale, as in PEFT."""
    q, upper = torch.linalg.qr(w)
    return upper[:r], q[:, :r]


def leading(residual: torch.Tensor, r: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with s B A = the best approximation of rank r to `residual` [N, K]."""
    return pissa(residual, r, scale)


def loftq(
    w: torch.Tensor, r: int, scale: float, bits: int, turns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(A, B, Q): Q = quantised(w - s B A) and s B A = svd_r(w - Q), `turns` times, from B A = 0. Q is dense, NF4 or int8 rows.

    PEFT does not divide by s, so its start is off where alpha is not r; Q is the same.
    """
    q = round_trip(w, bits)
    a, b = leading(w - q, r, scale)
    for _ in range(turns - 1):
        q = round_trip(w - scale * (b @ a), bits)
        a, b = leading(w - q, r, scale)
    return a, b, q


def round_trip(w: torch.Tensor, bits: int) -> torch.Tensor:
    """w as 4 bits (NF4, blocks of 64) or 8 bits (a scale per row) hold it."""
    single = w.to(torch.float32)
    stored = quantize_4bit(single, "nf4", blocksize=LOFTQ_BLOCKSIZE) if bits == 4 else quantize_int8(single)
    return stored.dequantize(w.dtype)
