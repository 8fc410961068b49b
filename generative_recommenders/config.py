"""Configuration: gin files and bindings in, plain frozen dataclasses out.

A configurable is a frozen dataclass registered under its public name with `configurable`; its fields are the bindings
it accepts and their annotations are the types. `load` reads gin's own grammar (scopes, `@references`, `%macros`,
includes, imports) and `Config.build` lets gin supply the fields. Differences from gin alone:

- a literal is compared with the field's annotation (`config_types`); an int becomes a float where a float is asked for;
- a misspelt configurable, parameter, macro, choice or file is answered with the nearest known name;
- every mistake is a `ConfigError` of one line that starts with file and line;
- macros are replaced by their values while loading, so an unknown one fails there;
- bindings that nothing used are listed by `Config.unused_bindings`; a parameter bound twice in one file is logged;
- two `Config` objects can be alive at once: gin's process-wide state is set again when another one is used;
- nothing that is returned is wrapped by gin, so instances pickle and travel to workers and ranks.
"""

import ast
import dataclasses
import enum
import fnmatch
import hashlib
import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gin
from gin import config_parser
from gin.config import ConfigurableReference

from generative_recommenders import config_registry as registry
from generative_recommenders.config_registry import configurable
from generative_recommenders.config_syntax import ConfigError, Macro, Reference, contained, parse, suggestion
from generative_recommenders.config_types import MismatchError, conform, type_text
from generative_recommenders.errors import one_line

__all__ = ["REGISTERING_MODULES", "Config", "ConfigError", "Main", "configurable", "load"]

REGISTERING_MODULES: tuple[str, ...] = (
    "generative_recommenders.retrieval.config",
    "generative_recommenders.encoders.hstu",
    "generative_recommenders.encoders.sasrec",
    "generative_recommenders.similarity.mol",
    "generative_recommenders.generative.beam_config",
    "generative_recommenders.generative.config",
    "generative_recommenders.generative.draft_head",
    "generative_recommenders.generative.parallel_config",
    "generative_recommenders.generative.sid_gr_config",
    "generative_recommenders.generative.specgr_config",
    "generative_recommenders.generative.tiger",
    "generative_recommenders.tokenizers.config",
    "generative_recommenders.tokenizers.controls",
    "generative_recommenders.tokenizers.product",
    "generative_recommenders.tokenizers.rqkmeans",
    "generative_recommenders.tokenizers.rqvae",
    "generative_recommenders.tokenizers.rvq",
)
"""Modules imported by `load`, because importing them registers configurables."""

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent

_GIN_CALL_NOTE = "\n  In call to configurable"
_COMMAND_LINE = "--gin_bindings"
# Wide enough that gin never breaks a binding over two lines.
_ONE_LINE = 1_000_000

_logger = logging.getLogger(__name__)


@configurable("main")
@dataclass(frozen=True)
class Main:
    """`main.experiment = @train_fn`: the configurable that the launcher builds and runs."""

    experiment: str = field(default="train_fn", metadata={"reference": True})


class _Key(NamedTuple):
    """A parameter in a scope, written `scope/name.field`; a macro where `field` is empty."""

    scope: str
    name: str
    field: str

    @classmethod
    def parse(cls, text: str) -> "_Key":
        return cls(*config_parser.parse_binding_key(text))

    def covers(self, used: "_Key") -> bool:
        """Whether a binding of this key reaches the parameter `used`: the same one, in this scope or inside it."""
        inside = not self.scope or f"{used.scope}/".startswith(f"{self.scope}/")
        return inside and self[1:] == used[1:]

    def __str__(self) -> str:
        return f"{self.scope}{'/' if self.scope else ''}{self.name}{'.' if self.field else ''}{self.field}"


class _Bound(NamedTuple):
    where: str
    value: Any


class Config:
    """A loaded configuration: builds instances of configurables and keeps account of the bindings they used."""

    _active: ClassVar["Config | None"] = None

    def __init__(self, values: Mapping[_Key, Any], imports: Sequence[str], unused_macros: Sequence[str]) -> None:
        self._values = dict(values)
        self._imports = tuple(imports)
        self._unused_macros = tuple(unused_macros)
        self._operative: dict[str, str] = {}

    def build(self, name_or_class: str | type, /, **runtime: Any) -> Any:
        """Construct a configurable, given by class or public name (`name` or `scope/name`), from its bindings.

        `runtime` wins over bindings.

        Raises:
            ConfigError: an unknown name, a required parameter that is not bound, or values that the class refuses.
        """
        if isinstance(name_or_class, str):
            *scopes, name = name_or_class.split("/")
        else:
            scopes, name = [], registry.name_of(name_or_class)
        registry.check_name(name)
        self._check_complete(name, scopes, runtime)
        self._activate()
        try:
            instance = gin.get_configurable("/".join([*scopes, f"{registry.GIN_MODULE}.{name}"]))(**runtime)
        except ValueError as error:
            message = str(error).split(_GIN_CALL_NOTE)[0]
            raise ConfigError(one_line(ValueError(message))) from error
        self._operative.update(_entries(gin.operative_config_str(_ONE_LINE)))
        return instance

    def experiment(self, **runtime: Any) -> Any:
        """Construct what `main.experiment` refers to, `@train_fn` where it is not bound."""
        return self.build(self.build(Main).experiment, **runtime)

    def operative(self) -> str:
        """Gin text of every parameter used so far, literal defaults included; `load` reads it back."""
        return self._text(self._operative)

    def full(self) -> str:
        """Gin text of every binding, used or not, with includes and macros resolved; `load` reads it back."""
        return self._text(self._bound_entries())

    def unused_bindings(self) -> list[str]:
        """Bindings that no construction has used since `load`, such as `hstu_encoder.num_blocks` in a SASRec run."""
        used = [_Key.parse(text) for text in self._operative]
        unused = [str(key) for key in self._values if not any(key.covers(other) for other in used)]
        return sorted([*unused, *self._unused_macros])

    def fingerprint(self, exclude: Iterable[str] = ()) -> str:
        """Hash (12 hexadecimal digits) of the bindings, whatever their order; spelling out a default changes nothing.

        `exclude` holds patterns such as `train_fn.num_epochs` or `create_data_loader.*`.
        """
        patterns = list(exclude)
        entries = self._bound_entries()
        kept = [
            f"{key} = {entries[str(key)]}"
            for key, value in self._values.items()
            if not any(fnmatch.fnmatchcase(str(key), pattern) for pattern in patterns)
            and not (key.scope == "" and registry.is_default(key.name, key.field, value))
        ]
        return hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()[:12]

    def _activate(self) -> None:
        if Config._active is self and gin.config_is_locked():
            return
        gin.clear_config()
        for key, value in self._values.items():
            gin.bind_parameter((key.scope, f"{registry.GIN_MODULE}.{key.name}", key.field), _as_gin(value))
        gin.finalize()
        Config._active = self

    def _bound_entries(self) -> dict[str, str]:
        self._activate()
        return _entries(gin.config_str(_ONE_LINE))

    def _text(self, entries: Mapping[str, str]) -> str:
        groups: dict[str, list[str]] = {"": [f"import {module}\n" for module in self._imports]}
        for text, value in sorted(entries.items()):
            key = _Key.parse(text)
            written = f"@{ast.literal_eval(value)}" if registry.is_reference(key.name, key.field) else value
            groups.setdefault(text.rpartition(".")[0], []).append(f"{text} = {written}\n")
        return "\n".join("".join(lines) for lines in groups.values() if lines)

    def _check_complete(
        self, name: str, scopes: Sequence[str], runtime: Mapping[str, Any], within: tuple[str, ...] = ()
    ) -> None:
        """Refuse a construction that leaves a required parameter open, here or in what its references construct."""
        scoped_name = "/".join([*scopes, name])
        if scoped_name in within:
            raise ConfigError(f"{scoped_name}: constructs itself through @{' -> @'.join(within)}; remove a reference")
        prefixes = ["/".join(scopes[:depth]) for depth in range(len(scopes), -1, -1)]
        for item in registry.fields(name).values():
            bound = [key for prefix in prefixes if (key := _Key(prefix, name, item.name)) in self._values]
            if item.name in runtime:
                continue
            if bound:
                for reference in contained(self._values[bound[0]], Reference):
                    self._check_complete(reference.name, reference.scopes or scopes, {}, (*within, scoped_name))
            elif item.default is item.default_factory is dataclasses.MISSING and not item.metadata.get("runtime"):
                expected = type_text(registry.type_of(name, item.name))
                raise ConfigError(f"{name}.{item.name}: not set, expected {expected}; bind it in the configuration")


def load(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> Config:
    """Read `files` in order, then `bindings`; the last binding of a parameter wins.

    A path, an included one as well, is looked up from the current folder, then from the repository root.

    Raises:
        ConfigError: anything in them that cannot be read, found, named or typed.
    """
    for module in REGISTERING_MODULES:
        importlib.import_module(module)
    reader = _Reader()
    for file in files:
        reader.read_file(str(file), where="", including=())
    reader.read_text("\n".join(bindings), _COMMAND_LINE, including=())
    return Config(reader.final_values(), reader.imports, reader.unused_macros())


class _Reader:
    """Collects the statements of files and bindings with their places, checks names and types."""

    def __init__(self) -> None:
        self.imports: list[str] = []
        self._bindings: list[tuple[_Key, _Bound]] = []
        self._macros: dict[str, _Bound] = {}
        self._used_macros: set[str] = set()

    def read_file(self, name: str, where: str, including: tuple[Path, ...]) -> None:
        """Read file `name`, which the statement at `where` in the last of the files `including` includes."""
        path = next((path for path in (Path(name), REPOSITORY_ROOT / name) if path.is_file()), None)
        if path is None:
            siblings = [other.as_posix() for other in Path(name).parent.glob("*.gin")]
            shipped = [
                other.relative_to(REPOSITORY_ROOT).as_posix() for other in REPOSITORY_ROOT.glob("configs/*/*.gin")
            ]
            hint = suggestion(name, siblings or shipped)
            raise ConfigError(f"{where}{name}: no such file here or in the repository; {hint}")
        if path.resolve() in including:
            raise ConfigError(f"{where}{name}: includes itself")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}{name}: cannot be read as UTF-8 text: {one_line(error)}") from error
        self.read_text(text, name, (*including, path.resolve()))

    def read_text(self, text: str, source: str, including: tuple[Path, ...]) -> None:
        """Read the statements of `text`, naming it `source` in messages."""
        lines: dict[str, int] = {}
        for statement in parse(text, source):
            line = statement.location.line_num
            where = f"{source}:{line}: "
            match statement:
                case config_parser.IncludeStatement():
                    self.read_file(statement.filename, f"{where}include ", including)
                case config_parser.ImportStatement():
                    self._import(statement.module, where)
                case config_parser.BlockDeclaration():
                    registry.check_name(statement.selector, where)
                case config_parser.BindingStatement():
                    key = _Key(statement.scope, statement.selector, statement.arg_name)
                    if previous := lines.get(str(key)):
                        _logger.warning("%s%s is bound twice; line %d has no effect", where, key, previous)
                    lines[str(key)] = line
                    self._bind(key, _Bound(where, statement.value))

    def _bind(self, key: _Key, bound: _Bound) -> None:
        if not key.field:
            self._macros[str(key)] = bound
            return
        registry.check_name(key.name, bound.where, f".{key.field}")
        registry.check_parameter(key.name, key.field, bound.where)
        self._bindings.append((key, bound))

    def _import(self, module: str, where: str) -> None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"{where}import {module}: {one_line(error)}") from error
        self.imports.append(module)

    def final_values(self) -> dict[_Key, Any]:
        """The value of each bound parameter, macros resolved, converted to the field's type."""
        values: dict[_Key, Any] = {}
        required: dict[_Key, str] = {}
        for key, (where, written) in self._bindings:
            hint = registry.type_of(key.name, key.field)
            value = self._resolve(written, where, ())
            required.pop(key, None)
            if value is gin.REQUIRED:
                required[key] = f"{where}{key} = {Macro('gin.REQUIRED')}: not set, expected {type_text(hint)}; bind it"
                continue
            if registry.is_reference(key.name, key.field) and isinstance(value, Reference):
                value = value.scoped_name
            try:
                values[key] = conform(value, hint, registry.class_of)
            except MismatchError as mismatch:
                raise ConfigError(f"{where}{key} = {value!r}: {mismatch}{_call_hint(value)}") from None
            if registry.is_reference(key.name, key.field):
                registry.check_name(values[key].rpartition("/")[2], f"{where}{key} = @")
        for message in required.values():
            raise ConfigError(message)
        return values

    def _resolve(self, value: Any, where: str, expanding: tuple[str, ...]) -> Any:
        """Replace macros and constants in `value`; check that its references exist."""
        if isinstance(value, dict):
            return dict(self._resolve(pair, where, expanding) for pair in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self._resolve(element, where, expanding) for element in value)
        if isinstance(value, Reference):
            registry.check_name(value.name, f"{where}@")
        if not isinstance(value, Macro):
            return value
        constants = registry.constants()
        if value.name in constants:
            return constants[value.name]
        if value.name in expanding:
            raise ConfigError(f"{where}{value}: macro is defined by itself")
        if value.name not in self._macros:
            raise ConfigError(f"{where}{value}: unknown macro; {suggestion(value.name, [*self._macros, *constants])}")
        self._used_macros.add(value.name)
        return self._resolve(self._macros[value.name].value, where, (*expanding, value.name))

    def unused_macros(self) -> list[str]:
        """Macros that no binding refers to; one that carries a parameter's name is taken for a forgotten prefix."""
        unused = sorted(self._macros.keys() - self._used_macros)
        for name in unused:
            owners = registry.owners(name)
            if owners:
                where, value = self._macros[name]
                raise ConfigError(f"{where}{name} = {value!r}: a macro nothing uses; did you mean {owners[0]}.{name}?")
        return unused


def _call_hint(value: Any) -> str:
    uncalled = [reference for reference in contained(value, Reference) if not reference.evaluate]
    return f"; try {uncalled[0]}()" if uncalled else ""


def _as_gin(value: Any) -> Any:
    """The form in which gin holds `value`: references and enum members become gin's references."""
    if isinstance(value, Reference):
        scopes = "".join(f"{scope}/" for scope in value.scopes)
        return ConfigurableReference(f"{scopes}{value.name}", value.evaluate)
    if isinstance(value, enum.Enum):
        return ConfigurableReference(f"{registry.constant_name(value)}/gin.constant", True)
    if isinstance(value, dict):
        return {_as_gin(k): _as_gin(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_as_gin(element) for element in value)
    return value


def _entries(text: str) -> dict[str, str]:
    """`{"scope/name.field": "value"}` of a config text written by gin with one binding a line."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {key: value for key, separator, value in (line.partition(" = ") for line in lines) if separator}
