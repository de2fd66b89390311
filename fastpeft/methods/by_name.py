"""A method by its name: "lora", "qlora", "ia3"; and methods of other packages.

    get_peft_config("dora", r=16)                     LoraConfig(use_dora=True, r=16)
    get_peft_config({"peft_type": "LORA", "r": 16})   PEFT's form

Every peft_type of METHODS is a name, letter case and "-" for "_" aside; NAMES has the others.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpeft.methods import METHODS, config_from_dict
from fastpeft.methods.config import PeftConfig


@dataclass(frozen=True)
class NamedMethod:
    """What a name means: a peft_type, options of its config, and options of a training run that go with it."""

    peft_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config_class(self) -> type[PeftConfig]:
        return METHODS[self.peft_type]


NAMES: dict[str, NamedMethod] = {
    "rslora": NamedMethod("LORA", {"use_rslora": True}),
    "dora": NamedMethod("LORA", {"use_dora": True}),
    "qlora": NamedMethod("LORA", training={"quantization": "nf4"}),
    "prefix": NamedMethod("PREFIX_TUNING"),
    "p_tuning_v2": NamedMethod("PREFIX_TUNING"),
    "adapter": NamedMethod("BOTTLENECK"),
    "houlsby": NamedMethod("BOTTLENECK", {"placement": "houlsby"}),
    "pfeiffer": NamedMethod("BOTTLENECK", {"placement": "pfeiffer"}),
    "parallel": NamedMethod("BOTTLENECK", {"placement": "parallel"}),
    "ln": NamedMethod("LN_TUNING"),
}
"""Names beside the peft_types. One whose peft_type is not in METHODS is not there yet."""


PEFT_TYPE_TO_CONFIG_MAPPING = METHODS
"""METHODS by PEFT's name."""


def method_names() -> list[str]:
    """Every name that `named_method` knows."""
    return sorted(
        [*(kind.lower() for kind in METHODS), *(name for name, row in NAMES.items() if row.peft_type in METHODS)]
    )


def named_method(name: str) -> NamedMethod:
    """What a name means. Raises ValueError with the nearest names and the list of all."""
    key = str(getattr(name, "value", name)).lower().replace("-", "_").replace(" ", "_")
    known = method_names()
    if key not in known:
        raise ValueError(f"method: expected one of {known}, got {name!r}{near_matches([key], known)}")
    return NAMES[key] if key in NAMES else NamedMethod(key.upper())


def get_peft_config(method: str | Mapping[str, Any], **options: Any) -> PeftConfig:
    """The config of a method by its name, or of a mapping with peft_type, such as an adapter_config.json's content.

    Raises:  ValueError for an unknown method or option, with the nearest names; what the config itself refuses
    """
    if isinstance(method, Mapping):
        return _from_mapping({**method, **options})
    named = named_method(method)
    check_fields(
        f"get_peft_config({method!r})", options, [item.name for item in dataclasses.fields(named.config_class)]
    )
    return named.config_class(**{**named.options, **options})


def _from_mapping(values: dict[str, Any]) -> PeftConfig:
    """PEFT writes fields of other methods and versions as null, false or empty: those mean "not used". What a file of PEFT has
    beside the fields here is PEFT's own (config_from_dict refuses what changes the function); elsewhere it is a typing error.
    """
    kind = values.get("peft_type")
    values["peft_type"] = getattr(kind, "value", kind)
    if values["peft_type"] in METHODS and "peft_version" not in values:
        config_class = METHODS[values["peft_type"]]
        fields = [item.name for item in dataclasses.fields(config_class)]
        known = {*fields, *config_class.unsupported, "peft_type", "auto_mapping"}
        used = {key for key, value in values.items() if key not in known and value not in (None, False, [], {})}
        check_fields("get_peft_config", sorted(used), fields)
    return config_from_dict(values)


def check_fields(where: str, names: Iterable[str], fields: Iterable[str]) -> None:
    """Raise a ValueError with the nearest fields if a name is not one of `fields`."""
    fields = sorted(set(fields))
    unknown = [name for name in names if name not in fields]
    if unknown:
        hint = near_matches(unknown, fields) or f"; there are {fields}"
        raise ValueError(f"{where}: expected names of options, got {unknown}{hint}")


def near_matches(names: Iterable[str], known: Iterable[str]) -> str:
    """ "; did you mean a -> ['b']?", or nothing where no name is near."""
    known = list(known)
    near = {name: difflib.get_close_matches(name, known, n=3) for name in names}
    hints = ", ".join(f"{name} -> {found}" for name, found in near.items() if found)
    return f"; did you mean {hints}?" if hints else ""


def register_method(config_class: type[PeftConfig]) -> type[PeftConfig]:
    """Make a method of another package known: loading, get_peft_config and the command line then find it. A decorator, too.

    Raises:  TypeError for anything but a dataclass over PeftConfig; ValueError for a peft_type that is empty or taken
    """
    where = "register_method"
    if not (isinstance(config_class, type) and issubclass(config_class, PeftConfig)):
        raise TypeError(f"{where}: expected a subclass of PeftConfig, got {config_class!r}")
    if "__dataclass_fields__" not in vars(config_class):
        raise TypeError(f"{where}: expected a dataclass, got {config_class.__name__}; put @dataclass above it")
    kind = config_class.peft_type
    if not kind or kind != kind.upper():
        raise ValueError(
            f"{where}: expected {config_class.__name__}.peft_type in capitals, such as 'MINE', got {kind!r}"
        )
    owner = METHODS.get(kind)
    if owner not in (None, config_class) or kind.lower() in NAMES:
        taken = owner.__name__ if owner else f"the name {kind.lower()!r}"
        raise ValueError(f"{where}: expected a new peft_type, got {kind!r}, which is {taken}")
    METHODS[kind] = config_class
    return config_class
