"""Bottleneck adapters: a small network in every layer is learned (Houlsby et al. 2019, arXiv:1902.00751).

f(v) = Up(act(Down(v))), with Down to a few numbers and Up back; where it stands is `placement`:

houlsby   y = h + s f(h), h the output projection of every attention and of the MLP (arXiv:1902.00751)
pfeiffer  the same after the MLP's output projection only (Pfeiffer et al. 2020, arXiv:2005.00247, 2005.00052)
parallel  y = MLP(x) + s f(x), x the MLP's input (He et al. 2021, arXiv:2110.04366)

The projection is inside the residual branch: the adapter acts on it before the dropout, the residual sum, and the LayerNorm
that follows, if one does (BERT, BART), which is the place in Houlsby et al.; in a pre-norm model (GPT-2, Llama, T5) it is
the same place of the branch. Gemma 2 and 3 normalise the branch once more after it.

PEFT has no such method: it answers an adapter folder of it with KeyError 'BOTTLENECK'. Load it with fastpeft.
"""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import is_linear_base, weight_shape
from fastpeft.layers.bottleneck import NON_LINEARITIES, BottleneckAdapter, BottleneckSettings, Position
from fastpeft.methods.targeted import LayerwiseConfig
from fastpeft.methods.targets import base_modules, is_inside

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")

# By model_type: output projections of the attentions, output projection of the MLP, and the MLP where one module is it.
_BERT_LIKE = (("attention.output.dense",), ("output.dense",), ("output",))
_LLAMA_LIKE = (("o_proj",), ("down_proj",), ("mlp",))
_GPT2_LIKE = (("attn.c_proj", "crossattention.c_proj"), ("mlp.c_proj",), ("mlp",))
_T5_LIKE = (("SelfAttention.o", "EncDecAttention.o"), ("DenseReluDense.wo",), ("DenseReluDense",))
_BART_LIKE = (("self_attn.out_proj", "encoder_attn.out_proj"), ("fc2",), ())
_FALCON_LIKE = (("self_attention.dense",), ("dense_4h_to_h",), ("mlp",))
_GPTJ_LIKE = (("attn.out_proj",), ("fc_out",), ("mlp",))
_PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), _BERT_LIKE),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA_LIKE),
    **dict.fromkeys(("stablelm", "phi3"), _LLAMA_LIKE),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2_LIKE),
    **dict.fromkeys(("t5", "mt5"), _T5_LIKE),
    **dict.fromkeys(("bart", "mbart", "opt"), _BART_LIKE),
    **dict.fromkeys(("falcon", "bloom"), _FALCON_LIKE),
    **dict.fromkeys(("gptj", "codegen"), _GPTJ_LIKE),
    "distilbert": (("attention.out_lin",), ("ffn.lin2",), ("ffn",)),
    "gpt_neo": (("attention.out_proj",), ("mlp.c_proj",), ("mlp",)),
    "gpt_neox": (("attention.dense",), ("dense_4h_to_h",), ("mlp",)),
    "phi": (("self_attn.dense",), ("fc2",), ("mlp",)),
    "mpt": (("attn.out_proj",), ("ffn.down_proj",), ("ffn",)),
}
PLACEMENT_TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "houlsby": {kind: attention + mlp for kind, (attention, mlp, _) in _PLACES.items()},
    "pfeiffer": {kind: mlp for kind, (_, mlp, _) in _PLACES.items()},
    "parallel": {kind: whole for kind, (_, _, whole) in _PLACES.items()},
}
"""What target_modules=None means, by placement and `model.config.model_type`."""

RESIDUAL_ARGUMENT = "input_tensor"
"""The second argument of BertOutput and its like: the MLP's input, to which the module adds its own result."""


@dataclass
class BottleneckConfig(LayerwiseConfig):
    """Options of bottleneck adapters. Of several active ones, parallel ones add up and the others act one after another.

    With target_modules given, the adapter goes after those modules, or beside them with "parallel".
    Raises:  ValueError for a value outside its range
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    known_to_peft: ClassVar[bool] = False
    shown_elsewhere: ClassVar[frozenset[str]] = LayerwiseConfig.shown_elsewhere | {
        "reduction_factor",
        "bottleneck_size",
        "dropout",
        "layer_norm",
        "init_weights",
    }

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """houlsby: after every attention's and the MLP's output projection; pfeiffer: after the MLP's only; parallel: beside the
    MLP."""
    reduction_factor: float = 16.0
    """The bottleneck's width is what it reads divided by this, at least 1."""
    bottleneck_size: int | None = None
    """The bottleneck's width itself, instead of reduction_factor."""
    non_linearity: str = "relu"
    """relu (Pfeiffer et al., He et al.), gelu_new (Houlsby et al.'s code), gelu, silu, swish, tanh, sigmoid, leaky_relu,
    linear."""
    scaling: float = 1.0
    """s; He et al. use 4 for parallel adapters."""
    dropout: float = 0.0
    """Probability that an element of what the adapter reads is dropped in training."""
    layer_norm: bool = False
    """Normalise what the adapter reads, with a LayerNorm of its own."""
    residual: bool = True
    """Keep h in y = h + s f(h). False: y = s f(h), which does not begin as the identity; not for parallel."""
    init_weights: bool | Literal["houlsby"] = True
    """True: Up is zero, exactly the identity; "houlsby": all weights normal with deviation 1e-2; False: both random."""

    def __post_init__(self):
        super().__post_init__()
        if self.placement not in PLACEMENTS:
            raise ValueError(f"BottleneckConfig: expected placement one of {PLACEMENTS}, got {self.placement!r}")
        if not isinstance(self.reduction_factor, (int, float)) or self.reduction_factor <= 0:
            raise ValueError(f"BottleneckConfig: expected reduction_factor > 0, got {self.reduction_factor!r}")
        size = self.bottleneck_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"BottleneckConfig: expected bottleneck_size a number >= 1 or None, got {size!r}")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(
                f"BottleneckConfig: expected non_linearity one of {sorted(NON_LINEARITIES)}, got {self.non_linearity!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"BottleneckConfig: expected 0 <= dropout < 1, got {self.dropout!r}")
        if self.init_weights not in (True, False, "houlsby"):
            raise ValueError(
                f"BottleneckConfig: expected init_weights True, False or 'houlsby', got {self.init_weights!r}"
            )
        if not self.residual and self.placement == "parallel":
            raise ValueError(
                "BottleneckConfig: residual=False replaces a module's output, got it with placement='parallel', which adds "
                "to it; use 'pfeiffer' or 'houlsby'"
            )

    @classmethod
    def bias_choices(cls) -> tuple[str, ...]:
        return ("none", "all", "bottleneck_only")

    @property
    def default_targets(self) -> dict[str, tuple[str, ...]]:
        return PLACEMENT_TARGETS[self.placement]

    def target_paths(self, model: nn.Module, *, strict: bool = True) -> list[str]:
        """Raises:  NotImplementedError for "parallel" where the architecture's MLP is no module of its own"""
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if self.target_modules is None and self.default_targets.get(kind) == ():
            raise NotImplementedError(
                f"BottleneckConfig: expected an MLP that is one module for placement='parallel', got model_type {kind!r}, "
                "whose layers compute it themselves; use placement='pfeiffer' or 'houlsby'"
            )
        paths = super().target_paths(model, strict=strict)
        if self.target_modules is None and self.placement != "houlsby":  # "output" names BERT's attention.output too
            paths = [path for path in paths if not is_inside(path, ["attention.output"])]
        return paths

    def resolved(self, model: nn.Module, paths: list[str]) -> "BottleneckConfig":
        config = super().resolved(model, paths)
        return dataclasses.replace(config, target_modules=list(paths)) if self.target_modules is None else config

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        reads, gives = widths(path, module)
        position: Position = "after"
        if self.placement == "parallel" and isinstance(module, nn.Embedding):
            raise ValueError(
                f"BottleneckConfig: expected a module that reads numbers for placement='parallel', got the embedding {path}; "
                "use 'pfeiffer', which acts on what it gives"
            )
        if self.placement == "parallel":
            position = "residual" if adds_its_second_argument(module) else "beside"
        if position != "beside":
            reads = gives
        size = self.bottleneck_size or max(1, int(reads / self.reduction_factor))
        layer = BottleneckAdapter(module)
        layer.add_bottleneck(
            adapter_name,
            (reads, size, gives),
            BottleneckSettings(position, self.non_linearity, self.scaling, self.dropout, self.residual),
            layer_norm=self.layer_norm,
            init_weights=self.init_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        return layer


def adds_its_second_argument(module: nn.Module) -> bool:
    """True for BertOutput and its like: norm(dense(x) + input_tensor), where only the argument comes before the norm."""
    names = list(inspect.signature(module.forward).parameters)
    return names[1:2] == [RESIDUAL_ARGUMENT]


def widths(path: str, module: nn.Module) -> tuple[int, int]:
    """(what a module reads, what it gives): a linear's sizes; of a module of several linears, the first's and the last's.

    Raises:  ValueError where the module has no weight to tell
    """
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.embedding_dim
    linears = [inner for _, inner in base_modules(module) if is_linear_base(inner)]
    if linears:
        return weight_shape(linears[0])[1], weight_shape(linears[-1])[0]
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() == 1:  # a norm
        return len(weight), len(weight)
    raise ValueError(
        f"target_modules: expected a linear, an embedding, a norm or a module that holds linears, got "
        f"{type(module).__name__} at {path}; name one of those"
    )
