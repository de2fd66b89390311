"""Part "attention": every model of the walk runs fastpeft's attention, as attn_implementation="fastpeft" would have it do.

Masks are made in their smallest form then, no score of a longer sequence is kept, and no padded, windowed or packed batch needs
a mask of Sq * Sk elements: integrations/attention.py. What was set before comes back at restore.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from fastpeft.integrations.acceleration.apply import Walk

_REPLACED = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def replace_attention(walk: "Walk") -> None:
    """Set the implementation in the config of every transformers model in the walk's, its own sub-models' too."""
    from transformers import PreTrainedModel

    from fastpeft.integrations.attention import NAME

    seen: set[int] = set()
    replaced = []
    for path, module in walk.core.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module.config) in seen:
            continue
        seen.add(id(module.config))
        before = module.config._attn_implementation
        if before == NAME:
            continue
        why = _why_not(module, before)
        if why is not None:
            walk.ledger.keep(path, module, "attention", why)
            continue
        _set(walk, module.config, NAME)
        replaced.append(str(before))
    if replaced:
        was = ", ".join(sorted(set(replaced)))
        walk.ledger.note(f"attention  attn_implementation={NAME!r} in {len(replaced)} config(s), was {was}")


def _why_not(model: "PreTrainedModel", before: str | None) -> str | None:
    config = model.config
    if before not in _REPLACED:
        return f"attn_implementation={before!r} was chosen by somebody who knows why"
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    if getattr(config, "output_attentions", False):
        return "config.output_attentions is on, and fastpeft's attention has no weights to give"
    if getattr(config, "reorder_and_upcast_attn", False):
        return "config.reorder_and_upcast_attn is on"
    return None


def _set(walk: "Walk", config: "PretrainedConfig", name: str) -> None:
    """Of this config alone: the public property would set its sub-configs too, whose models decide for themselves."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name

    def undo():
        config._attn_implementation_internal = before

    walk.ledger.undo_by(undo)
