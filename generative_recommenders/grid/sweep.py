"""What a grid varies: `train_fn.learning_rate=1e-3,3e-4` as a binding and its values, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gin import config_parser

from generative_recommenders import config_registry as registry
from generative_recommenders.config import ConfigError, load
from generative_recommenders.config_syntax import Macro, Reference, contained, parse
from generative_recommenders.errors import UserError

_OPENING, _CLOSING = "([{", ")]}"


class GridError(UserError):
    """A grid that cannot be planned, or a folder that it cannot use."""


@dataclass(frozen=True)
class Sweep:
    """One binding and the values it takes, both in gin's own spelling."""

    key: str
    values: tuple[str, ...]

    @property
    def bindings(self) -> list[str]:
        return [f"{self.key} = {value}" for value in self.values]

    @property
    def is_macro(self) -> bool:
        return not config_parser.parse_binding_key(self.key)[2]

    @classmethod
    def read(cls, text: str) -> Sweep:
        """`binding=value,value`.

        Raises:
            GridError: no binding, no value, an empty value, or a quote or bracket that is not closed.
        """
        key, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not key or not values:
            raise GridError(f"--sweep: got {text!r}, expected binding=value,value; try {_EXAMPLE}")
        return cls(key, tuple(split_values(values, text)))


_EXAMPLE = "--sweep 'train_fn.learning_rate=1e-3,3e-4'"


def split_values(values: str, source: str) -> list[str]:
    """The values of a list with commas; those inside quotes and brackets belong to a value."""
    parts, start, quote, open_brackets, escaped = [], 0, "", [], False
    for place, character in enumerate(values):
        if quote:
            if character == quote and not escaped:
                quote = ""
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in _OPENING:
            open_brackets.append(_CLOSING[_OPENING.index(character)])
        elif character in _CLOSING:
            if not open_brackets or open_brackets.pop() != character:
                raise GridError(f"--sweep: got {source!r}, where {character} closes nothing; remove it or open it")
        elif character == "," and not open_brackets:
            parts.append(values[start:place])
            start = place + 1
    if quote or open_brackets:
        raise GridError(f"--sweep: got {source!r}, where a {quote or 'bracket'} is not closed; close it")
    parts = [part.strip() for part in [*parts, values[start:]]]
    if not all(parts):
        raise GridError(f"--sweep: got {source!r}, where a value between two commas is empty; remove a comma")
    return parts


def check_bindings(bindings: Sequence[str], flag: str) -> list[str]:
    """Names and types of `bindings`, which are right or wrong whatever config they join; returns the bound keys.

    A value with a macro or a reference is left to the config, which gives it a meaning.

    Raises:
        GridError: a configurable or parameter that nothing knows, a value that cannot be read or is of another type.
    """
    keys = []
    for binding in bindings:
        try:
            statements = list(parse(binding, flag))
            for statement in statements:
                if not isinstance(statement, config_parser.BindingStatement):
                    raise GridError(f"{flag}: got {binding!r}, expected a binding such as train_fn.num_epochs = 3")
                keys.append(_checked_key(statement, flag))
            free = [s for s in statements if any(True for kind in (Macro, Reference) for _ in contained(s.value, kind))]
            if not free and all(statement.arg_name for statement in statements):
                load([], [binding])
        except ConfigError as error:
            raise GridError(f"{flag} {binding!r}: {str(error).partition(': ')[2]}") from error
    return keys


def _checked_key(statement: config_parser.BindingStatement, flag: str) -> str:
    scope, name, parameter = statement.scope, statement.selector, statement.arg_name
    if parameter:
        registry.check_name(name, f"{flag}: ", f".{parameter}")
        registry.check_parameter(name, parameter, f"{flag}: ")
    return f"{scope}/{name}.{parameter}".lstrip("/") if parameter else name
