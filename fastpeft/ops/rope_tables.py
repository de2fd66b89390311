"""Angles of rotary embeddings: plain, linear, dynamic NTK, YaRN, Llama-3 and LongRoPE scaling.

    angle(p, i) = p * inv_freq[i],    cos, sin = factor * cos(angle), factor * sin(angle)
    plain     inv_freq[i] = base^(-2 i / R)
    linear    inv_freq / s
    dynamic   base * (s n / P - (s - 1))^(R / (R - 2)) as the base, n = max(tokens, P)
    yarn      inv_freq / s below low, inv_freq above high turns of the pretraining length, a ramp between; factor 0.1 ln s + 1
    llama3    inv_freq / s for wavelengths above L / low, inv_freq below L / high, smooth between
    longrope  inv_freq / f[i], f the short or the long list; factor sqrt(1 + ln s / ln L)

R columns are rotated, s is the scaling's factor, P max_position_embeddings, L the pretraining length. Each formula is computed
in float32 in the order in which transformers computes it, so that the results have the same bits.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched past the pretraining length; the fields are those of transformers' rope_parameters."""

    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: Sequence[float] | None = None
    long_factor: Sequence[float] | None = None

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"RopeScaling: expected rope_type among {ROPE_TYPES}, got {self.rope_type!r}")
        missing = [name for name in _NEEDS.get(self.rope_type, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"RopeScaling: expected {', '.join(missing)} for rope_type {self.rope_type!r}, got None")
        if self.factor is not None and not self.factor > 0:
            raise ValueError(f"RopeScaling: expected factor > 0, got {self.factor}")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> "RopeScaling":
        """From transformers' `config.rope_parameters` or `rope_scaling`; what is not about scaling is left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        kept = {name: value for name, value in parameters.items() if name in names and value is not None}
        if "type" in parameters:
            kept.setdefault("rope_type", parameters["type"])
        return cls(**kept)


PLAIN = RopeScaling()


def inverse_frequencies(
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: RopeScaling = PLAIN,
    max_position_embeddings: int = 2048,
    tokens: int | None = None,
) -> tuple[torch.Tensor, float]:
    """(inv_freq [R/2] in float32 on the CPU, the factor of cos and sin) for R = rotary_dim columns.

    tokens: the length of the sequence; None means what fits the pretraining length.
    Raises:  ValueError for an odd or non-positive R, or lists of another length than R/2
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"inverse_frequencies: expected an even rotary_dim > 0, got {rotary_dim}")
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float) / rotary_dim
    kind = scaling.rope_type
    if kind == "default":
        return 1.0 / (base**steps), 1.0
    if kind == "linear":
        return (1.0 / (base**steps)) / scaling.factor, 1.0
    if kind == "dynamic":
        tokens = max_position_embeddings if tokens is None else max(tokens, max_position_embeddings)
        stretch = (scaling.factor * tokens / max_position_embeddings) - (scaling.factor - 1)
        return 1.0 / ((base * stretch ** (rotary_dim / (rotary_dim - 2))) ** steps), 1.0
    pretrained = scaling.original_max_position_embeddings or max_position_embeddings
    if kind == "llama3":
        return _llama3(1.0 / (base**steps), scaling, pretrained), 1.0
    factor = max_position_embeddings / pretrained if scaling.factor is None else scaling.factor
    if kind == "yarn":
        return _yarn(base**steps, rotary_dim, base, factor, scaling, pretrained), _yarn_factor(factor, scaling)
    long = tokens is not None and tokens > pretrained
    stretch = torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=torch.float32)
    if stretch.shape != steps.shape:
        raise ValueError(
            f"inverse_frequencies: expected {len(steps)} longrope factors, R/2 of R = {rotary_dim}, got {len(stretch)}"
        )
    return 1.0 / (stretch * base**steps), _longrope_factor(factor, scaling, pretrained)


def _llama3(inv_freq, scaling, pretrained):
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    stretched = torch.where(wavelength > pretrained / low, inv_freq / scaling.factor, inv_freq)
    smooth = (pretrained / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    is_between = ~(wavelength < pretrained / high) * ~(wavelength > pretrained / low)
    return torch.where(is_between, between, stretched)


def _yarn(wavelengths, rotary_dim, base, factor, scaling, pretrained):
    def dimension_of(turns):
        """The column whose angle makes `turns` full turns within the pretraining length."""
        return (rotary_dim * math.log(pretrained / (turns * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension_of(scaling.beta_fast or 32), dimension_of(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_factor(factor, scaling):
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight=1):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return float(mscale(scaling.mscale) / mscale(scaling.mscale_all_dim))
    return mscale()


def _longrope_factor(factor, scaling, pretrained):
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(pretrained))


def cos_sin(
    inv_freq: torch.Tensor, positions: torch.Tensor, factor: float = 1.0, *, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., R/2] of positions [...] * inv_freq [R/2], computed in float32, times `factor`."""
    angles = positions[..., None].float() * inv_freq.to(positions.device)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
