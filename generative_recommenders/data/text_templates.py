"""Texts of items from templates over the columns of `items.parquet`.

    {title|textual_id}. Brand: {brand}. Categories: {categories: > }

A field is a column in braces. `{a|b}` takes `a`, or `b` where `a` is missing. A list is joined by what follows the
colon, else by a comma and a space. The template is read as clauses that end at `. `, `; ` or a line break: a clause
with a missing field is left out together with the sign before it, so that an item without a brand reads
`Title. Categories: a > b`. A field is missing where its column is absent, its cell is null, blank or an empty list.

The templates of the public datasets follow TIGER (Rajput et al., NeurIPS 2023), which describes an item by title, brand
and category; products of 2023 are described by title, features, categories and description, as in SpecGR (Ding et al.,
2024). Unlike the published code, prices are not used, and a missing field leaves no empty label behind.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from generative_recommenders.data.errors import DataError

MOVIES = "{title}. Genres: {genres|categories}"
PRODUCTS = "{title|textual_id}. Brand: {brand}. Categories: {categories: > }"
TOLD_PRODUCTS = "{title}. {features: }. {categories}. {description: }"
INVOICES = "{description}"
# By the beginning of a dataset's name.
TEMPLATES = {"ml-": MOVIES, "amzn": PRODUCTS, "amazon23-": TOLD_PRODUCTS, "online-retail": INVOICES}

_NOT_TEXT = ("item_id", "raw_id", "embedding")
_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")
_CLAUSE_END = re.compile(r"(\. |; |\n)")
_WHITE_SPACE = r"\s+"


@dataclass(frozen=True)
class _Field:
    """Columns in order of preference, and what joins a list."""

    columns: tuple[str, ...]
    joiner: str


@dataclass(frozen=True)
class _Clause:
    """Literals and fields by turns, and the sign that parts it from what is before."""

    sign: str
    parts: tuple[str | _Field, ...]


def template_of(dataset: str, columns: list[str]) -> str:
    """The template of a dataset: its own where its columns can fill it, else one over all its text columns.

    The latter is `{text}` where there is such a column, else `{title}` and every other text column under its name.

    Args:
        columns: text columns of its `items.parquet`, see `text_columns`.
    Raises:
        DataError: there is no text column.
    """
    if not columns:
        raise DataError(f"dataset {dataset!r}: items.parquet has no column of texts; prepare it with a table of items")
    for beginning, template in TEMPLATES.items():
        if dataset.startswith(beginning) and any(set(field.columns) & set(columns) for field in _fields(template)):
            return template
    if "text" in columns:
        return "{text}"
    labelled = [f"{name.replace('_', ' ').capitalize()}: {{{name}}}" for name in columns if name != "title"]
    return ". ".join((["{title}"] if "title" in columns else []) + labelled)


def text_columns(items: pa.Table) -> list[str]:
    """Names of the columns that hold texts or lists of texts, ids excluded, in the order of the table."""
    return [field.name for field in items.schema if field.name not in _NOT_TEXT and _is_text(field.type)]


def item_texts(items: pa.Table, template: str, *, strict: bool = False) -> list[str]:
    """One text a row of `items`; empty where every field of the template is missing.

    Args:
        template: see the module's docstring.
        strict: refuse a field of which the table has no column.
    Raises:
        DataError: the template has no field, unbalanced braces, or (if `strict`) a field without a column; a column is
            neither text, number nor a list of texts.
    """
    clauses = _parsed(template)
    for field in _fields(template):
        if strict and not set(field.columns) & set(items.column_names):
            raise DataError(
                f"template: got the field {'|'.join(field.columns)!r}, expected one of "
                f"{', '.join(name for name in items.column_names if name != 'embedding')}; correct the name"
            )
    nothing = pa.array([""] * items.num_rows, pa.string())
    texts, begun, filled = nothing, pc.is_null(nothing), pc.is_null(nothing)
    for clause in clauses:
        values = [part if isinstance(part, str) else _values(items, part) for part in clause.parts]
        # A null among the parts makes the whole clause null.
        whole = pc.binary_join_element_wise(nothing, *values, "")
        there = pc.is_valid(whole)
        whole = pc.fill_null(whole, "")
        after = pc.binary_join_element_wise(texts, pc.if_else(begun, clause.sign, ""), whole, "")
        texts = pc.if_else(there, after, texts)
        begun = pc.or_(begun, there)
        if any(isinstance(part, _Field) for part in clause.parts):
            filled = pc.or_(filled, there)
    return list(pc.if_else(filled, texts, "").to_pylist())


def _parsed(template: str) -> list[_Clause]:
    if not _FIELD.search(template):
        raise DataError(f"template: got {template!r:.80}, expected a field such as {{title}}; name a column in braces")
    # Fields are taken out first: what joins a list may look like the end of a clause.
    fields: list[_Field] = []

    def taken(match: re.Match[str]) -> str:
        columns = tuple(name.strip() for name in match[1].split("|"))
        fields.append(_Field(columns, ", " if match[2] is None else match[2]))
        return "\0"

    bare = _FIELD.sub(taken, template.replace("\0", ""))
    if "{" in bare or "}" in bare:
        raise DataError(f"template: got {template!r:.80}, expected braces in pairs, as in {{title|text}}; correct it")
    pieces = _CLAUSE_END.split(bare)
    clauses, left = [], iter(fields)
    for sign, body in zip(["", *pieces[1::2]], pieces[::2], strict=True):
        words = body.split("\0")
        parts: list[str | _Field] = [words[0]]
        for word in words[1:]:
            parts += [next(left), word]
        clauses.append(_Clause(sign, tuple(parts)))
    return clauses


def _fields(template: str) -> list[_Field]:
    return [part for clause in _parsed(template) for part in clause.parts if isinstance(part, _Field)]


def _values(items: pa.Table, field: _Field) -> pa.Array:
    columns = [_texts(items, name, field.joiner) for name in field.columns if name in items.column_names]
    return pc.coalesce(*columns) if columns else pa.nulls(items.num_rows, pa.string())


def _texts(items: pa.Table, name: str, joiner: str) -> pa.Array:
    """A column as texts with single spaces; what is blank is null."""
    column = items[name].combine_chunks()
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if _is_list(kind) and _is_string(kind.value_type):
        return _joined(column, joiner)
    if not (_is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"items.parquet, column {name}: got type {kind}, expected texts; leave it out of the template")
    return _clean(pc.cast(column, pa.string()))


def _joined(lists: pa.ListArray, joiner: str) -> pa.Array:
    """Each list as one text, without its null and blank entries; null where nothing is left."""
    names = _clean(pc.cast(pc.list_flatten(lists), pa.string()))
    kept = pc.is_valid(names).to_numpy(zero_copy_only=False)
    rows = pc.list_parent_indices(lists).to_numpy()[kept]
    counts = np.bincount(rows, minlength=len(lists))
    offsets = pa.array(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))
    texts = pc.binary_join(pa.ListArray.from_arrays(offsets, pc.drop_null(names)), joiner)
    return pc.if_else(pa.array(counts > 0), texts, pa.scalar(None, pa.string()))


def _clean(texts: pa.Array) -> pa.Array:
    single = pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, _WHITE_SPACE, " "))
    return pc.if_else(pc.equal(single, ""), pa.scalar(None, pa.string()), single)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or _is_list(kind):
        kind = kind.value_type
    return _is_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
