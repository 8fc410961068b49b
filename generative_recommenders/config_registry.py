"""The registry of configurables: public names, the dataclasses behind them, their fields and types."""

import dataclasses
import enum
import functools
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import gin

from generative_recommenders.config_syntax import ConfigError, suggestion

GIN_MODULE = "generative_recommenders"

T = TypeVar("T")
_classes: dict[str, type] = {}
_constants: dict[str, enum.Enum] = {}


def configurable(name: str) -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass as the gin configurable `name`; the class itself is returned unchanged.

    Field metadata: `{"runtime": True}` marks a value that the program supplies and a configuration cannot bind;
    `{"reference": True}` marks a `str` field that a configuration writes as `@other`; it receives the name `other`, to
    be given to `Config.build`.
    """

    def register(cls: type[T]) -> type[T]:
        if not dataclasses.is_dataclass(cls):
            raise TypeError(f"{name}: got {cls.__name__}, expected a dataclass; put @configurable above @dataclass")
        runtime = [item.name for item in dataclasses.fields(cls) if item.metadata.get("runtime")]
        # Registering modules may be imported after a configuration has been loaded, which locks gin.
        with gin.unlock_config():
            gin.register(name, module=GIN_MODULE, denylist=runtime)(cls)
        _classes[name] = cls
        return cls

    return register


def names() -> list[str]:
    """All registered names."""
    return list(_classes)


def class_of(name: str) -> type:
    """The dataclass registered as `name`."""
    return _classes[name]


def name_of(cls: type) -> str:
    """The name `cls` is registered under."""
    for name, registered in _classes.items():
        if registered is cls:
            return name
    raise ConfigError(f"{cls.__name__}: not a configurable; {suggestion(cls.__name__, _classes)}")


def fields(name: str) -> dict[str, "dataclasses.Field[Any]"]:
    """Fields of the configurable `name` that its constructor takes, in order."""
    return {item.name: item for item in dataclasses.fields(_classes[name]) if item.init}


def owners(parameter: str) -> list[str]:
    """Names of the configurables with a field `parameter`."""
    return [name for name in _classes if parameter in fields(name)]


def is_reference(name: str, parameter: str) -> bool:
    """Whether `name.parameter` is written `@other` and receives the name `other`."""
    return bool(fields(name)[parameter].metadata.get("reference"))


def is_default(name: str, parameter: str, value: Any) -> bool:
    """Whether `value` is the default of `name.parameter`."""
    item = fields(name)[parameter]
    default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
    return type(value) is type(default) and bool(value == default)


def type_of(name: str, parameter: str) -> Any:
    """Annotation of `name.parameter`; the members of its enums become the gin constants `%Enum.MEMBER`."""
    return _hints(_classes[name])[parameter]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    for annotation in hints.values():
        for option in (annotation, *typing.get_args(annotation)):
            if isinstance(option, type) and issubclass(option, enum.Enum):
                _register_constants(option)
    return hints


@functools.cache
def _register_constants(kind: type[enum.Enum]) -> None:
    for member in kind:
        gin.constant(constant_name(member), member)
        _constants[constant_name(member)] = member


def constant_name(member: enum.Enum) -> str:
    """Name of the gin constant that stands for `member`."""
    return f"{type(member).__name__}.{member.name}"


def constants() -> dict[str, Any]:
    """What `%name` may refer to beside the macros of a configuration."""
    return {"gin.REQUIRED": gin.REQUIRED, **_constants}


def check_name(name: str, where: str = "", parameter: str = "") -> None:
    """Refuse a `name` that is not registered."""
    if name not in _classes:
        raise ConfigError(f"{where}{name}{parameter}: no configurable is named {name}; {suggestion(name, _classes)}")


def check_parameter(name: str, parameter: str, where: str) -> None:
    """Refuse a `parameter` that the registered `name` does not have, or that a configuration may not bind."""
    known = fields(name)
    if parameter not in known:
        bindable = [candidate for candidate, item in known.items() if not item.metadata.get("runtime")]
        elsewhere = owners(parameter)
        hint = f"did you mean {elsewhere[0]}.{parameter}?" if elsewhere else suggestion(parameter, bindable)
        raise ConfigError(f"{where}{name}.{parameter}: {name} has no parameter {parameter}; {hint}")
    if known[parameter].metadata.get("runtime"):
        raise ConfigError(f"{where}{name}.{parameter}: supplied by the program, not by a config; remove the line")
