"""Literals of a configuration compared with the type annotation of the field they are bound to."""

import collections.abc
import enum
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from generative_recommenders.config_syntax import Reference, suggestion

_NONE = type(None)
_SEQUENCES: dict[Any, type] = {list: list, collections.abc.Sequence: list, tuple: tuple}
_MAPPINGS = (dict, collections.abc.Mapping)


class MismatchError(Exception):
    """`value` is not of type `annotation`; the text is `expected X, got Y`."""

    def __init__(self, value: Any, annotation: Any) -> None:
        got = repr(value) if value is None or isinstance(value, Reference) else f"{type(value).__name__} {value!r}"
        choices = [str(choice) for choice in _choices(annotation)]
        hint = f"; {suggestion(value, choices)}" if choices and isinstance(value, str) else ""
        # A list of all choices is already in the expected type.
        hint = "" if hint.startswith("; known") else hint
        super().__init__(f"expected {type_text(annotation)}, got {got}{hint}")


def conform(value: Any, annotation: Any, class_of: Callable[[str], type]) -> Any:
    """Return `value` as `annotation` wants it, or raise `MismatchError`.

    Lossless conversions only: int to float, a float without fraction (`1e9`) to int, list to tuple and back, and the
    value or name of an enum's member to the member. A bool is never a number. `class_of` maps the name of an evaluated
    reference to its class.
    """
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Any:
        return value
    if origin is typing.Union or origin is types.UnionType:
        return _conform_union(value, annotation, class_of)
    if origin is Literal:
        return _first(value, annotation, (a for a in arguments if a == value and type(a) is type(value)))
    if isinstance(value, Reference):
        fits = value.evaluate and isinstance(origin, type) and issubclass(class_of(value.name), origin)
        return _first(value, annotation, (value for _ in range(fits)))
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return _first(value, annotation, (m for m in origin if value is m or value in (m.value, m.name)))
    if origin in _SEQUENCES:
        return _conform_sequence(value, annotation, class_of)
    if origin in _MAPPINGS:
        if not isinstance(value, dict):
            raise MismatchError(value, annotation)
        key_type, value_type = arguments or (Any, Any)
        return {conform(k, key_type, class_of): conform(v, value_type, class_of) for k, v in value.items()}
    return _conform_scalar(value, annotation)


def _first(value: Any, annotation: Any, matches: Iterator[Any]) -> Any:
    for match in matches:
        return match
    raise MismatchError(value, annotation)


def _conform_union(value: Any, annotation: Any, class_of: Callable[[str], type]) -> Any:
    results = []
    for option in typing.get_args(annotation):
        try:
            results.append(conform(value, option, class_of))
        except MismatchError:
            continue
    # `int | float` keeps 1 an int: an option that changes nothing wins over a conversion.
    return _first(value, annotation, iter(sorted(results, key=lambda result: type(result) is not type(value))))


def _conform_sequence(value: Any, annotation: Any, class_of: Callable[[str], type]) -> Any:
    if not isinstance(value, list | tuple):
        raise MismatchError(value, annotation)
    kind = _SEQUENCES[typing.get_origin(annotation) or annotation]
    arguments = typing.get_args(annotation)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise MismatchError(value, annotation)
        return tuple(conform(v, a, class_of) for v, a in zip(value, arguments, strict=True))
    element = arguments[0] if arguments else Any
    return kind(conform(v, element, class_of) for v in value)


def _conform_scalar(value: Any, annotation: Any) -> Any:
    if annotation is None or annotation is _NONE:
        return _first(value, annotation, (None for _ in range(value is None)))
    if annotation is float and type(value) is int:
        return float(value)
    if annotation is int and type(value) is float and value.is_integer():
        return int(value)
    # gin reads 1e999 as infinity, which it could not write back.
    if type(value) is not annotation or (type(value) is float and not math.isfinite(value)):
        raise MismatchError(value, annotation)
    return value


def type_text(annotation: Any) -> str:
    """An annotation in a user's words: `float`, `int or None`, `one of 'test', 'valid'`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is _NONE:
        return "None"
    if origin is typing.Union or origin is types.UnionType:
        return " or ".join(type_text(argument) for argument in arguments)
    if choices := _choices(annotation):
        return f"one of {', '.join(map(repr, choices))}"
    if origin is not None or not isinstance(annotation, type):
        return str(annotation).replace("typing.", "").replace("collections.abc.", "")
    return annotation.__name__


def _choices(annotation: Any) -> list[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return list(arguments)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    if origin is typing.Union or origin is types.UnionType:
        return [choice for argument in arguments for choice in _choices(argument)]
    return []
