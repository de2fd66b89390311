"""The options of a command that takes an adapter's config: its own, and exactly those of the method that --method names.

TrainConfig says "any method" (PeftConfig); a command line needs the fields of one. So a dataclass is built for the method, tyro
makes the flags of it, and what comes back is made an instance of the command's own class again.
"""

import dataclasses
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from fastpeft.methods.by_name import NamedMethod, method_names, named_method
from fastpeft.methods.config import PeftConfig

FLAG = "--method"
DEFAULT = "lora"


def takes_method(kind: type) -> bool:
    """True for a command's config with an adapter's config in it."""
    return any(item.name == "peft" for item in dataclasses.fields(kind))


def chosen_method(options: list[str]) -> str:
    """The last --method of a command line, or lora. Raises ValueError for a name that is not one, or a flag without one."""
    chosen = DEFAULT
    for index, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name == FLAG:
            if not equals:
                value = options[index + 1] if index + 1 < len(options) else ""
            if not value or value.startswith("-"):
                raise ValueError(f"{FLAG}: expected one of {method_names()}, got none")
            chosen = value
    named_method(chosen)
    return chosen


def with_method(kind: type, method: str) -> type:
    """`kind` with the fields of a method in place of PeftConfig's, a field `method`, and the method's presets as defaults.

    A field of the method that `kind` has too gets the flag --peft-NAME, so that no flag means two things.
    """
    named = named_method(method)
    taken = {item.name for item in dataclasses.fields(kind)} | {"method"}
    about = f"The PEFT method, one of {', '.join(method_names())}; it decides which of the options below there are."
    changed: list[tuple] = [
        ("peft", _with_defaults(named.config_class, named.options, taken)),
        ("method", Annotated[str, tyro.conf.arg(help=about)], dataclasses.field(default=method)),
    ]
    for item in dataclasses.fields(kind):
        if item.name in named.training:
            changed.append((item.name, item.type, dataclasses.field(default=named.training[item.name])))
    return dataclasses.make_dataclass(
        kind.__name__,
        changed,
        bases=(kind,),
        kw_only=True,
        namespace={"__doc__": kind.__doc__, "__module__": kind.__module__},
    )


def _with_defaults(config: type[PeftConfig], presets: Any, taken: set[str]) -> type[PeftConfig]:
    """The config with other defaults, --peft-NAME for the names that are taken, and no flag for what text cannot say; itself
    where nothing changes."""
    changed = []
    hints = get_type_hints(config, include_extras=True)
    for item in dataclasses.fields(config):
        hint, preset = hints[item.name], dataclasses.field(default=presets[item.name]) if item.name in presets else None
        if item.name in taken:
            changed.append(
                (item.name, Annotated[hint, tyro.conf.arg(name=f"peft-{item.name}")], preset or _again(item))
            )
        elif not _has_text_form(hint):
            changed.append((item.name, Annotated[hint, tyro.conf.Fixed, tyro.conf.Suppress], preset or _again(item)))
        elif preset is not None:
            changed.append((item.name, hint, preset))
    if not changed:
        return config
    namespace = {"__doc__": config.__doc__, "__module__": config.__module__}
    return dataclasses.make_dataclass(config.__name__, changed, bases=(config,), namespace=namespace)


def _has_text_form(hint: Any) -> bool:
    """False for a type whose values a flag cannot say: anything at all, or a config inside the config."""
    return "Any" not in str(hint) and not any(dataclasses.is_dataclass(part) for part in (hint, *get_args(hint)))


def _again(item: dataclasses.Field) -> Any:
    """The same default for a new field."""
    if item.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=item.default_factory)
    return dataclasses.field() if item.default is dataclasses.MISSING else dataclasses.field(default=item.default)


def plain(parsed: Any, kind: type, method: str) -> Any:
    """What tyro made of `with_method(kind, method)`, as a `kind` with the method's own config class."""
    named: NamedMethod = named_method(method)
    peft = named.config_class(**_values(parsed.peft, named.config_class))
    return kind(**_values(parsed, kind) | {"peft": single_pattern(peft)})


def _values(parsed: Any, kind: type) -> dict[str, Any]:
    return {item.name: getattr(parsed, item.name) for item in dataclasses.fields(kind) if item.init}


def single_pattern(peft: PeftConfig) -> PeftConfig:
    """One target that is "all-linear" or a regular expression, which a command line gives as a list of one, as text.

    For every option that takes a list of names or a pattern: target_modules, exclude_modules, and a method's own.
    """
    changes = {}
    for item in dataclasses.fields(peft):
        value = getattr(peft, item.name)
        takes_both = item.name.endswith("_modules") and item.name != "modules_to_save"
        if takes_both and isinstance(value, list) and len(value) == 1:
            one = value[0]
            if one == "all-linear" or set(one) & set("*+?()[]|^$\\"):
                changes[item.name] = one
    return dataclasses.replace(peft, **changes) if changes else peft
