"""Amazon product reviews of 2014, one category, as 5-core sequences (McAuley et al., SIGIR 2015).

What Beauty, Sports and Toys share. The raw files are the published `reviews_<category>_5.json.gz` and, for titles,
`meta_<category>.json.gz`, or a folder of sequences (`generative_recommenders.data.sequence_folder`), told apart by the
files that are there.

Every user and item has at least 5 events: the published files are filtered already, and the filter is repeated until
nothing changes. Ids are 1-based ranks of the sorted raw ids; a folder of sequences keeps its own. Time has the
resolution of a day, so that many events of a user tie and keep the order of the file.
"""

import ast
import html
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from generative_recommenders.data import sequence_folder
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.json_lines import lines, read_json_lines
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source, product_text
from generative_recommenders.data.sources.amzn_books import ranks
from generative_recommenders.data.tables import TIME_LIMIT, encoded, to_numpy

logger = logging.getLogger(__name__)

MIN_COUNT = 5
_PLACE = "snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_REVIEW_FIELDS = pa.schema(
    {"reviewerID": pa.string(), "asin": pa.string(), "overall": pa.float32(), "unixReviewTime": pa.int64()}
)
_ASIN = re.compile(rb"""['"]asin['"]\s*:\s*['"]([^'"]*)['"]""")
# A product's line has some ten thousand bytes. Python's parser is not made for text of any length.
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AmazonReviews(Source):
    """Reads the reviews and products of one category.

    Attributes:
        category: as the published files spell it.
    """

    category: str

    @property
    def reviews_file(self) -> str:
        """Name of the file of events."""
        return f"reviews_{self.category}_5.json.gz"

    @property
    def products_file(self) -> str:
        """Name of the file of titles, brands and categories."""
        return f"meta_{self.category}.json.gz"

    def chosen_files(self, raw: RawFiles) -> list[str]:
        if raw.has(self.reviews_file):
            return [name for name in (self.reviews_file, self.products_file) if raw.has(name)]
        return sequence_folder.chosen_files(raw) if sequence_folder.is_sequence_folder(raw) else []

    def read(self, raw: RawFiles | None) -> RawEvents:
        assert raw is not None
        if raw.has(self.reviews_file):
            return self._read_reviews(raw)
        if sequence_folder.is_sequence_folder(raw):
            return sequence_folder.read_sequence_folder(raw)
        raise DataError(
            f"{raw.path}: got neither {self.reviews_file} nor {sequence_folder.SEQUENCES} nor "
            f"{sequence_folder.INTERACTIONS}, expected one of them; check --raw"
        )

    def _read_reviews(self, raw: RawFiles) -> RawEvents:
        where = raw.where(self.reviews_file)
        table = read_json_lines(raw.read(self.reviews_file), _REVIEW_FIELDS, where=where)
        times = to_numpy(table["unixReviewTime"])
        if (abs(times.astype(np.float64)) >= TIME_LIMIT).any():
            row = int(np.argmax(abs(times.astype(np.float64)) >= TIME_LIMIT))
            raise DataError(f"{where}, object {row + 1}, unixReviewTime: got {times[row]}, expected seconds")
        user_codes, users = encoded(table["reviewerID"])
        item_codes, items = encoded(table["asin"])
        first = ~pd.DataFrame({"user": user_codes, "item": item_codes}).duplicated().to_numpy()
        repeated = int((~first).sum())
        if repeated:
            logger.warning("%s: %d reviews repeat a user and an item, the first of each is kept", where, repeated)
        kept = np.flatnonzero(first)
        core, rounds = five_core(user_codes[kept], item_codes[kept])
        dropped = len(kept) - int(core.sum())
        kept = kept[core]
        if not len(kept):
            raise DataError(f"{where}: got no users and items with {MIN_COUNT} reviews each; get the complete file")
        logger.info(
            "%s: %d of %d reviews in the %d-core, after %d rounds", where, len(kept), table.num_rows, MIN_COUNT, rounds
        )
        user_ids, user_names = ranks(user_codes[kept], users)
        item_ids, item_names = ranks(item_codes[kept], items)
        return RawEvents(
            user_ids=user_ids,
            item_ids=item_ids,
            ratings=to_numpy(table["overall"])[kept],
            timestamps=times[kept],
            items=self._catalogue(raw, item_names),
            users=pa.table({"user_id": np.arange(1, len(user_names) + 1), "raw_user_id": user_names}),
            facts={"repeated_reviews_dropped": repeated, "reviews_outside_core_dropped": dropped},
        )

    def _catalogue(self, raw: RawFiles, asins: pa.Array) -> pa.Table:
        columns = {"item_id": pa.array(np.arange(1, len(asins) + 1)), "raw_id": asins}
        if not raw.has(self.products_file):
            logger.warning("%s: no %s, so that items have no titles", raw.path, self.products_file)
            return pa.table(columns)
        where = raw.where(self.products_file)
        names: list[str] = asins.to_pylist()
        found = dict(products(raw.read(self.products_file), set(names), where))
        known = [found.get(name, _UNKNOWN) for name in names]
        if len(found) < len(names):
            logger.warning("%s: %d of %d items are not listed", where, len(names) - len(found), len(names))
        text = pa.string()
        columns |= {
            "title": pa.array([product.title for product in known], text),
            "text": pa.array([product_text(p.title, p.brand, p.categories) for p in known], text),
            "categories": pa.array([product.categories for product in known], pa.list_(text)),
            "brand": pa.array([product.brand for product in known], text),
        }
        return pa.table(columns)


@dataclass(frozen=True)
class Product:
    """What is told of a product; `categories` is the first of its paths, the root first."""

    title: str | None
    brand: str | None
    categories: list[str]


_UNKNOWN = Product(None, None, [])


def five_core(user_codes: np.ndarray, item_codes: np.ndarray) -> tuple[np.ndarray, int]:
    """The largest part of the events in which every user and every item has 5 or more.

    Args:
        user_codes, item_codes: integers >= 0, (E,).
    Returns:
        bool (E,), which events remain, and how many rounds removed something: 0 for what is a 5-core already.
    """
    kept = np.ones(len(user_codes), dtype=bool)
    rounds = 0
    while True:
        users, items = np.bincount(user_codes[kept]), np.bincount(item_codes[kept])
        left = kept.copy()
        left[kept] = (users[user_codes[kept]] >= MIN_COUNT) & (items[item_codes[kept]] >= MIN_COUNT)
        if left.sum() == kept.sum():
            return kept, rounds
        kept, rounds = left, rounds + 1


def products(content: pa.Buffer, wanted: set[str], where: str) -> Iterator[tuple[str, Product]]:
    """The wanted products of a file with one Python literal a line, each once; HTML entities are decoded.

    A line that names no wanted product is passed over unread: the published file has twenty times as many.

    Raises:
        DataError: truncated gzip, or a line that is no literal of a dict with the fields expected; nothing in it is
            ever executed.
    """
    left = set(wanted)
    for number, line in lines(content, where):
        named = _ASIN.findall(line)
        if named and left.isdisjoint(name.decode("utf-8", "replace") for name in named):
            continue
        here = f"{where}, line {number}"
        record = _literal(line, here)
        asin = record.get("asin")
        if not isinstance(asin, str):
            raise DataError(f"{here}: got asin {asin!r:.60}, expected a text; fix the line")
        if asin in left:
            left.remove(asin)
            yield asin, _product(record, here)


def _literal(line: bytes, here: str) -> Mapping[str, Any]:
    if len(line) > _MAX_LINE_BYTES:
        raise DataError(f"{here}: got {len(line):,} bytes, expected one product; get the file again")
    try:
        with warnings.catch_warnings():
            # A backslash in a title that escapes nothing is no fault of the reader.
            warnings.simplefilter("ignore")
            record = ast.literal_eval(line.decode("utf-8").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{here}: not the literal of a dict ({reason:.120}); fix the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{here}: got {type(record).__name__}, expected the literal of a dict; fix the line")
    return record


def _product(record: Mapping[str, Any], here: str) -> Product:
    paths = record.get("categories") or [[]]
    if not (
        isinstance(paths, list)
        and all(isinstance(path, list) and all(isinstance(name, str) for name in path) for path in paths)
    ):
        raise DataError(f"{here}, categories: got {paths!r:.60}, expected a list of lists of texts; fix the line")
    return Product(
        title=_text(record, "title", here),
        brand=_text(record, "brand", here),
        categories=[html.unescape(name).strip() for name in paths[0]],
    )


def _text(record: Mapping[str, Any], name: str, here: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{here}, {name}: got {value!r:.60}, expected a text; fix the line")
    return html.unescape(value).strip() or None if value else None


def source(name: str, category: str, *, users: int, items: int, events: int) -> AmazonReviews:
    """The dataset of one category with its published counts, which either kind of raw files must have."""
    files = (f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz")
    return AmazonReviews(
        name=name,
        category=category,
        downloads={file: (f"https://{_PLACE}/{file}", f"http://{_PLACE}/{file}") for file in files},
        expected_counts={"users": users, "items_rated": items, "events": events},
    )
