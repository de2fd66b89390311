"""Which modules of a model a config means: names, regular expressions, "all-linear", or the architecture's usual ones."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import is_linear_base
from fastpeft.methods.config import HEAD_NAMES

ALL_LINEAR = "all-linear"

_QV = ("q_proj", "v_proj")
_TEXT_QV = r".*language_model\..*\.(q_proj|v_proj)"
DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("llama", "llama4", "llama4_text", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text"), _QV),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm", "starcoder2", "smollm3", "granite"), _QV),
    **dict.fromkeys(("olmo", "olmo2", "cohere", "cohere2", "opt", "gptj", "gpt_neo"), _QV),
    **dict.fromkeys(("bart", "mbart", "pegasus", "m2m_100", "blenderbot"), _QV),
    **dict.fromkeys(("gemma3", "gemma4"), _TEXT_QV),
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "layoutlm", "albert"), ("query", "value")
    ),
    **dict.fromkeys(("t5", "mt5", "mpnet"), ("q", "v")),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon", "RefinedWebModel", "RefinedWeb", "chatglm"), ("query_key_value",)),
    "distilbert": ("q_lin", "v_lin"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj",),
    **dict.fromkeys(("mpt", "modernbert"), ("Wqkv",)),
    "btlm": ("c_proj", "c_attn"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "codegen": ("qkv_proj",),
}
"""Attention projections that are usually adapted, by `model.config.model_type`; PEFT's own table where it has a row.

A text is a regular expression: of a model that also sees, its language model's projections alone.
"""


class NoTargetError(ValueError):
    """No module of the model has a name that was asked for; the message lists the names that do exist."""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model as it was before any adapter: a wrapper stands under its path as the module it wraps.

    A module that is registered under several paths comes once per path. What is inside a wrapped module stands under the
    path that it had there; nothing inside a module with copies (modules_to_save) is listed.
    """
    for path, module in _as_before(model, remove_duplicate=False):
        yield path, module.get_base_layer() if isinstance(module, AdapterLayer) else module


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """(path, wrapper) of every wrapped module, by the paths of base_modules; a shared one once, under its first path."""
    for path, module in _as_before(model, remove_duplicate=True):
        if isinstance(module, AdapterLayer):
            yield path, module


def _as_before(model: nn.Module, *, remove_duplicate: bool) -> Iterator[tuple[str, nn.Module]]:
    """named_modules without what wrappers hold, but for what is inside their bases, under the paths without wrappers."""
    wrapped: list[str] = []
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        outer = [prefix for prefix in wrapped if path.startswith(prefix)]
        if any(path == prefix + "base_layer" or not path.startswith(f"{prefix}base_layer.") for prefix in outer):
            continue  # the base itself stands under its wrapper's path; the rest is the adapters'
        if isinstance(module, AdapterLayer):
            wrapped.append(f"{path}.")
        for prefix in sorted(outer, key=len, reverse=True):
            path = prefix + path.removeprefix(f"{prefix}base_layer.")
        yield path, module


def names_module(target: str, path: str) -> bool:
    """True if `target` is the path or its last components: "q_proj" and "self_attn.q_proj" name "h.0.self_attn.q_proj"."""
    return path == target or path.endswith(f".{target}")


def is_inside(path: str, names: Iterable[str]) -> bool:
    """True if the path or a module that contains it is named by one of `names`."""
    return any(f".{name}." in f".{path}." for name in names)


def check_pattern(where: str, text: str) -> None:
    """Raise a ValueError that names the field if `text` is not a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{where}: expected a regular expression, got {text!r}: {error}") from error


def matcher(spec: str | Iterable[str], field: str = "target_modules") -> Callable[[str], bool]:
    """A string is a regular expression for the whole path; a list holds last components."""
    if isinstance(spec, str):
        check_pattern(field, spec)
        return lambda path: re.fullmatch(spec, path) is not None
    names = list(spec)
    return lambda path: any(names_module(name, path) for name in names)


def layer_index(path: str, layers_pattern: str | list[str] | None) -> int | None:
    """The number of the transformer layer that a module is in: the first numbered component, or the one after a pattern."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    for expression in expressions:
        found = re.match(expression, path)
        if found:
            return int(found[1])
    return None


def linear_paths(model: nn.Module, task_type: str | None) -> list[str]:
    """What "all-linear" means: every linear module except the output embedding and, for classification, the head."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    output = output.get_base_layer() if isinstance(output, AdapterLayer) else output
    heads = HEAD_NAMES.get(task_type, ())
    return [
        path
        for path, module in _unique(base_modules(model))
        if is_linear_base(module)
        and module is not output
        and not is_inside(path, heads)
        and not _in_attention_module(model, path)
    ]


def find_targets(
    model: nn.Module,
    target_modules: str | Iterable[str] | None,
    *,
    task_type: str | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    modules_to_save: Iterable[str] = (),
    layers_to_transform: int | list[int] | None = None,
    layers_pattern: str | list[str] | None = None,
    strict: bool = True,
    defaults: dict[str, tuple[str, ...] | str] | None = None,
) -> list[str]:
    """Paths of the modules that are meant, in the model's order; a module with several paths is listed once.

    None takes the architecture's row of `defaults` (DEFAULT_TARGETS). strict=False lets a listed name match nothing.
    Raises:  NoTargetError if a listed name matches nothing (strict), or nothing is left; it names what exists
    """
    modules = list(base_modules(model))
    if target_modules is None:
        target_modules, strict = _default_targets(model, DEFAULT_TARGETS if defaults is None else defaults), False
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        target_modules = linear_paths(model, task_type)
    elif not isinstance(target_modules, str):
        target_modules = list(target_modules)
        missing = [name for name in target_modules if not any(names_module(name, path) for path, _ in modules)]
        if missing and strict:
            raise NoTargetError(_missing_message(missing, modules))
    wanted = matcher(target_modules)
    excluded = matcher(exclude_modules, "exclude_modules") if exclude_modules else lambda path: False
    saved = list(modules_to_save)
    indices = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    paths = [
        path
        for path, _ in _unique((path, module) for path, module in modules if path and wanted(path))
        if not excluded(path)
        and not is_inside(path, saved)
        and (not indices or layer_index(path, layers_pattern) in indices)
    ]
    if not paths:
        raise NoTargetError(
            f"target_modules: no module is left of {_shown(target_modules)} with exclude_modules={exclude_modules!r}, "
            f"modules_to_save={saved}, layers_to_transform={layers_to_transform!r}; {_existing(modules)}"
        )
    for path in paths:
        if _in_attention_module(model, path):
            raise NotImplementedError(
                f"target_modules: {path} is inside torch.nn.MultiheadAttention, which reads its weight without calling it; "
                "an adapter there would do nothing"
            )
    return paths


def paths_of_saved_modules(model: nn.Module, names: Iterable[str], optional: Iterable[str] = ()) -> list[str]:
    """Paths named by modules_to_save, compared by whole components: "norm" is not "input_layernorm".

    Raises:  NoTargetError if a name that is not optional matches nothing
    """
    modules = list(base_modules(model))
    names, optional = list(names), set(optional)
    missing = [n for n in names if n not in optional and not any(names_module(n, path) for path, _ in modules)]
    if missing:
        raise NoTargetError(_missing_message(missing, modules, "modules_to_save"))
    return [path for path, _ in _unique((p, m) for p, m in modules if any(names_module(n, p) for n in names))]


def parameters_named(path: str, module: nn.Module, names: Iterable[str]) -> list[str]:
    """The module's own parameters that target_parameters mean, such as "experts.gate_up_proj", in the module's order."""
    names = list(names)
    return [
        parameter
        for parameter, _ in module.named_parameters(recurse=False)
        if any(names_module(name, f"{path}.{parameter}") for name in names)
    ]


def owners_of_parameters(model: nn.Module, names: Iterable[str], *, strict: bool = True) -> list[str]:
    """Paths of the modules that hold the parameters named by target_parameters.

    Raises:  NoTargetError if a name matches nothing (strict), or all together match nothing
    """
    modules, names = list(base_modules(model)), list(names)
    found = {
        name: [path for path, module in _unique(modules) if parameters_named(path, module, [name])] for name in names
    }
    missing = [name for name, paths in found.items() if not paths]
    if missing and (strict or len(missing) == len(names)):
        held = dict.fromkeys(
            f"{path.rpartition('.')[2]}.{name}"
            for path, module in modules
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        )
        raise NoTargetError(
            f"target_parameters: no parameter is named {_shown(missing)}; parameters with three dimensions are {list(held)}"
        )
    wanted = {path for paths in found.values() for path in paths}
    return [path for path, _ in _unique(modules) if path in wanted]


def names_peft_agrees_on(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The same modules_to_save for PEFT, which compares with a bare endswith: a name that would take more there becomes paths."""
    every = [path for path, _ in base_modules(model) if path]
    agreed = []
    for name in names:
        exact = [path for path in every if names_module(name, path)]
        agreed += [name] if exact == [path for path in every if path.endswith(name)] else exact
    return list(dict.fromkeys(agreed))


def _default_targets(model: nn.Module, defaults: dict[str, tuple[str, ...] | str]) -> list[str] | str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in defaults:
        raise NoTargetError(
            f"target_modules: no default for model_type {kind!r}; give a list, a regular expression or 'all-linear'; "
            f"{_existing(list(base_modules(model)))}"
        )
    names = defaults[kind]
    return names if isinstance(names, str) else list(names)


def _unique(pairs: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for path, module in pairs:
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module


def _in_attention_module(model: nn.Module, path: str) -> bool:
    parent = path.rpartition(".")[0]
    return bool(parent) and isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def _adaptable(modules: list[tuple[str, nn.Module]]) -> list[str]:
    last = (
        path.rpartition(".")[2]
        for path, module in modules
        if is_linear_base(module) or isinstance(module, nn.Embedding)
    )
    return list(dict.fromkeys(last))


def _existing(modules: list[tuple[str, nn.Module]]) -> str:
    return f"the model's linear and embedding modules are {_adaptable(modules)}"


def _missing_message(missing: list[str], modules: list[tuple[str, nn.Module]], field: str = "target_modules") -> str:
    every = {path.rpartition(".")[2] for path, _ in modules if path}
    near = {name: difflib.get_close_matches(name.rpartition(".")[2], sorted(every), n=3) for name in missing}
    hints = ", ".join(f"{name} -> {found}" for name, found in near.items() if found)
    hint = f"; did you mean {hints}?" if hints else ""
    return f"{field}: no module is named {_shown(missing)}{hint}; {_existing(modules)}"


def _shown(names: str | list[str]) -> str:
    if isinstance(names, str) or len(names) <= 8:
        return repr(names)
    return f"{names[:8]!r} and {len(names) - 8} more"
