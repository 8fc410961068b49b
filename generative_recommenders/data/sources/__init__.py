"""Sources of events: one dataset a file, found by name.

A module of this package that has a `SOURCE` is a dataset; adding one is adding that file. A module without one holds
what several datasets share. What a source reads is checked, ordered and written by
`generative_recommenders.data.preprocess`.
"""

import dataclasses
import difflib
import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from generative_recommenders.data.download import download
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.raw_files import RawFiles


@dataclass(frozen=True)
class RawEvents:
    """What a source read: E events in the order of its files, and what is known of items and users.

    Attributes:
        user_ids, item_ids: int64 (E,); item ids are >= 1.
        ratings: float32 (E,).
        timestamps: int64 (E,), seconds.
        items: `item_id` int64 ascending, `raw_id` string, and where known `title`, `text`, `categories`, `brand`,
            `textual_id`, `embedding`.
        users: None, or `user_id` int64 ascending and further columns; may list users without events.
        facts: further entries of dataset.json.
        splits: None, or int8 (E,) where the files hold splits: 0 train, 1 valid, 2 test.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray
    items: pa.Table
    users: pa.Table | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    splits: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A dataset: where its raw files are, what is expected of them, and how they are read.

    Attributes:
        urls: places of the raw file, tried in turn; empty where there is nothing to download.
        file_name: name of the downloaded file inside the data folder.
        downloads: for a dataset of several files, file names and the places of each, instead of `urls`; they go to
            `raw/<name>/` inside the data folder.
        sha256: expected checksums of the files inside, where they are known.
        expected_counts: exact values of entries of `counts`, and of `max_item_id`; checked after reading.
        csv_id_shift: what `sasrec_format.csv` subtracts from ids, for the datasets whose CSV counts from 0.
        option_names: fields that a user may set; they are recorded with the prepared data.
    """

    name: str
    urls: tuple[str, ...] = ()
    file_name: str = ""
    downloads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    expected_counts: Mapping[str, int] = field(default_factory=dict)
    csv_id_shift: int = 0
    option_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def read(self, raw: RawFiles | None) -> RawEvents:
        """All events; `raw` is None exactly when the source needs no files. Raises `DataError`."""

    @property
    def needs_files(self) -> bool:
        """Whether `read` takes files; False for a source that generates its events."""
        return True

    def chosen_files(self, raw: RawFiles) -> list[str]:
        """Names of the files that `read` takes, for a source that goes by what is there; else empty."""
        return []

    def fetch(self, data_dir: Path) -> Path:
        """Path of the raw files inside `data_dir`, downloaded first where they are not there yet."""
        if self.downloads:
            folder = data_dir / "raw" / self.name
            for file, urls in self.downloads.items():
                if not (folder / file).exists():
                    download(urls, folder / file, remedy=f"put it at {folder / file}")
            return folder
        if not self.urls:
            raise DataError(f"--raw: dataset {self.name!r} cannot be downloaded; name its file with --raw=FILE")
        target = data_dir / self.file_name
        if not target.exists():
            download(self.urls, target)
        return target

    @property
    def options(self) -> dict[str, Any]:
        """Values of the options, as JSON holds them."""
        return {name: _plain(getattr(self, name)) for name in self.option_names}

    def with_options(self, **options: Any) -> "Source":
        """A copy with other options. Raises `DataError` for one that this source does not have."""
        for name in options:
            if name not in self.option_names:
                known = ", ".join(f"--{known}" for known in self.option_names) or "none"
                raise DataError(f"--{name}: dataset {self.name!r} does not use it, its options are: {known}")
        return dataclasses.replace(self, **options)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@functools.cache
def _registry() -> dict[str, Source]:
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {module.SOURCE.name: module.SOURCE for module in modules if hasattr(module, "SOURCE")}


def names() -> list[str]:
    """Names of all datasets, sorted."""
    return sorted(_registry())


def get(name: str) -> Source:
    """The source of this name. Raises `DataError` that lists the known names and the nearest one."""
    try:
        return _registry()[name]
    except KeyError:
        nearest = difflib.get_close_matches(name.lower().replace("_", "-"), names(), n=1, cutoff=0.0)[0]
        raise DataError(
            f"dataset: got {name!r}, expected one of {', '.join(names())}; did you mean {nearest!r}?"
        ) from None


def item_text(title: str, categories: list[str], label: str = "Categories") -> str:
    """One sentence or two that describe an item to a text model: `Title. Categories: a, b.`"""
    return f"{title}. {label}: {', '.join(categories)}." if categories else f"{title}."


def product_text(title: str | None, brand: str | None, path: list[str]) -> str | None:
    """What describes a product to a text model: `Title. Brand: brand. Categories: a > b`; None if nothing is known."""
    parts = [title, f"Brand: {brand}" if brand else None, f"Categories: {' > '.join(path)}" if path else None]
    return ". ".join(part for part in parts if part) or None
