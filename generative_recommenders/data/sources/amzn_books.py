"""Amazon product reviews, books (McAuley et al., SIGIR 2015), filtered as in the published preprocessing.

Items and users are counted once, on the raw rows; a row stays where both counts are 5 or more (one pass, no iterated
core). The items that remain are the catalogue. Users left with fewer than 5 events are then dropped. Ids are
1-based ranks of the sorted raw ids; time has the resolution of a day, so that most ties keep the order of the file.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source
from generative_recommenders.data.tables import encoded, read_delimited, to_numpy

_MIN_COUNT = 5


class AmazonBooks(Source):
    """Reads `ratings_Books.csv`: user, item, rating, timestamp, without a header."""

    def read(self, raw: RawFiles | None) -> RawEvents:
        assert raw is not None
        file = raw.path.name if raw.is_single_file else "ratings_Books.csv"
        text = pa.dictionary(pa.int32(), pa.string())
        table = read_delimited(
            raw.read(file),
            {"user": text, "item": text, "rating": pa.float32(), "timestamp": pa.int64()},
            where=raw.where(file),
            names=("user", "item", "rating", "timestamp"),
        )
        user_codes, users = encoded(table["user"])
        item_codes, items = encoded(table["item"])
        kept = (np.bincount(user_codes)[user_codes] >= _MIN_COUNT) & (np.bincount(item_codes)[item_codes] >= _MIN_COUNT)
        user_ids, user_names = ranks(user_codes[kept], users)
        item_ids, item_names = ranks(item_codes[kept], items)
        # The catalogue is what remains before short users go, as published.
        long = np.bincount(user_ids)[user_ids] >= _MIN_COUNT
        return RawEvents(
            user_ids=user_ids[long],
            item_ids=item_ids[long],
            ratings=to_numpy(table["rating"])[kept][long],
            timestamps=to_numpy(table["timestamp"])[kept][long],
            items=pa.table({"item_id": np.arange(1, len(item_names) + 1), "raw_id": item_names}),
            users=pa.table({"user_id": np.arange(1, len(user_names) + 1), "raw_user_id": user_names}),
        )


def ranks(codes: np.ndarray, values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """int64 (E,): 1-based ranks of the values that occur in `codes`, and those values sorted."""
    used = np.flatnonzero(np.bincount(codes, minlength=len(values)))
    names = values.take(pa.array(used))
    order = pc.array_sort_indices(names).to_numpy()
    rank = np.zeros(len(values), dtype=np.int64)
    rank[used[order]] = np.arange(1, len(used) + 1)
    return rank[codes], names.take(pa.array(order))


SOURCE = AmazonBooks(
    name="amzn-books",
    urls=(
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Books.csv",
        "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Books.csv",
    ),
    file_name="ratings_Books.csv",
    expected_counts={"items_listed": 695_762, "max_item_id": 695_762},
    csv_id_shift=1,
)
