"""Gin's grammar, read with file and line: statements out, mistakes as one line.

Uses the parser of gin-config, with placeholders in the place of references and macros, so that names are resolved by
`generative_recommenders.config`, which knows where each one stands.
"""

import difflib
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from gin import config_parser

from generative_recommenders.errors import UserError, one_line

Statement: TypeAlias = (
    config_parser.BindingStatement
    | config_parser.BlockDeclaration
    | config_parser.ImportStatement
    | config_parser.IncludeStatement
)

_LITERAL_NOTE = "Failed to parse token "


class ConfigError(UserError):
    """A configuration that cannot be used; one line that starts with the file and line, or with the binding."""


@dataclass(frozen=True)
class Reference:
    """`@scope/name`, or `@scope/name()` where `evaluate`."""

    scoped_name: str
    evaluate: bool

    @property
    def name(self) -> str:
        return self.scoped_name.rpartition("/")[2]

    @property
    def scopes(self) -> list[str]:
        return self.scoped_name.split("/")[:-1]

    def __repr__(self) -> str:
        return f"@{self.scoped_name}{'()' if self.evaluate else ''}"


@dataclass(frozen=True)
class Macro:
    """`%name`."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


class _Placeholders(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def parse(text: str, source: str) -> Iterator[Statement]:
    """Statements of `text`; `source` names it in a `ConfigError`."""
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _Placeholders())
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ConfigError(f"{source}:{error.lineno}: cannot read {line!r}: {_syntax_remedy(error.msg)}") from error
    except tokenize.TokenError as error:
        message, (line_number, _) = error.args
        raise ConfigError(f"{source}:{line_number}: {message}: a bracket or a string is not closed") from error
    # A TypeError is a dict with a key such as a list.
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: {one_line(error)}") from error


def _syntax_remedy(message: str) -> str:
    if _LITERAL_NOTE in message:
        token = message.partition(_LITERAL_NOTE)[2].strip("'")
        return f"got {token}, expected a literal, @reference or %macro; a string needs quotes"
    return message.rstrip(".")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or the list of known names where none is near."""
    by_lower_case = {candidate.lower(): candidate for candidate in sorted(known)}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    if near:
        return f"did you mean {by_lower_case[near[0]]}?"
    return f"known: {', '.join(by_lower_case.values()) or 'none'}"


def contained(value: Any, kind: type) -> Iterator[Any]:
    """Every instance of `kind` in a literal, however deep in its lists, tuples and dicts."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for key_and_value in value.items():
            yield from contained(key_and_value, kind)
    elif isinstance(value, list | tuple):
        for element in value:
            yield from contained(element, kind)
