"""Fractal expansion: a ratings matrix grown to any size, with the shape of the one it comes from.

Source: "Scalable Realistic Recommendation Datasets through Fractal Expansions" (arXiv 1901.08910). A small matrix G
with the singular values of the ratings R is the coarse pattern of the expansion; block (i, j) of it is R with the
fraction G[i, j] of its entries kept at random, and its rows and columns in a random order. U users by I items times
rows x cols of G give rows*U users by cols*I items.

Where this differs from the published code:

- Item ids count from 1. The published ids are column numbers from 0, which is padding to the models that read them.
- A user's events are not sorted by item id. Every event keeps its relative place in the history it was copied from, and
  the pieces of the blocks of one user are merged by that place; ties go by block.
- Every block has a random generator of its own, from (seed, i, j), so that any block can be made again alone. The same
  seed and NumPy version give the same bytes.
- The resize that reduces the singular vectors is linear interpolation with an antialiasing triangle filter
  (`torch.nn.functional.interpolate`), not a spline after a Gaussian blur. Both average over what one output covers.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import user_order
from generative_recommenders.data.tables import encoded

# Users with no more distinct times than this are left out, as in the published code.
_MAX_TIMES_LEFT_OUT = 2
# An element of G outside of these would make a block empty, or R itself.
MIN_KEPT, MAX_KEPT = 0.001, 0.995
_OVERSAMPLE = 8
_MAX_PASSES = 24
_TOLERANCE = 1e-6
# Places in a history are fractions of 1 << 16.
_PLACES = 1 << 16


@dataclass(frozen=True)
class Settings:
    """What an expansion depends on beside its input; the fields are the flags of the command line."""

    random_seed: int = 0
    num_row_multiplier: int = 16
    num_col_multiplier: int = 32
    element_sample_rate: float = 1.0
    block_sample_rate: float = 1.0

    def check(self) -> None:
        """Raise `DataError` for the first value out of range."""
        for name, value in asdict(self).items():
            flag = "--" + name.replace("_", "-")
            if name == "random_seed" and value < 0:
                raise DataError(f"{flag}: got {value}, expected 0 or more; try {flag} 0")
            if name.endswith("multiplier") and value < 1:
                raise DataError(f"{flag}: got {value}, expected 1 or more; try {flag} 16")
            if name.endswith("rate") and not 0 < value <= 1:
                raise DataError(f"{flag}: got {value}, expected more than 0 and at most 1; try {flag} 1.0")


@dataclass(frozen=True)
class Ratings:
    """The matrix R: U users by I items with E entries, by user and oldest first within a user.

    Attributes:
        starts_U1: int64 (U + 1,), where a user's entries begin.
        items_E: int32 (E,), item index 0..I-1.
        codes_E: unsigned (E,), index into `values_V`.
        places_E: uint16 (E,), place in the user's history, a fraction of 1 << 16.
        values_V: float32 (V,), the distinct ratings, ascending.
        num_items: I.
    """

    starts_U1: np.ndarray
    items_E: np.ndarray
    codes_E: np.ndarray
    places_E: np.ndarray
    values_V: np.ndarray
    num_items: int

    @property
    def num_users(self) -> int:
        return len(self.starts_U1) - 1

    @property
    def num_events(self) -> int:
        return len(self.items_E)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the content."""
        digest = hashlib.sha256(str(self.num_items).encode())
        for array in (self.starts_U1, self.items_E, self.codes_E, self.values_V):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def index_ratings(events: pa.Table, where: str) -> Ratings:
    """The matrix of a table of events.

    Args:
        events: `user_id` and `item_id` integers, `rating` float32, `timestamp` int64, a row an event in any order.
        where: how messages name the input.
    Raises:
        DataError: no user has events at more than two times.
    """
    users, times = _sorted_codes(events["user_id"]), events["timestamp"].to_numpy()
    order = user_order(users, times)
    users, times = users[order], times[order]
    starts = np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))
    # The number of distinct times of a user is that of the places where the sorted time, or the user, changes.
    changes = np.concatenate(([True], (times[1:] != times[:-1]) | (users[1:] != users[:-1])))
    kept_users = np.add.reduceat(changes, starts, dtype=np.int64) > _MAX_TIMES_LEFT_OUT
    lengths = np.diff(np.append(starts, len(users)))
    del users, times, changes
    if not kept_users.any():
        raise DataError(
            f"{where}: got no user with events at more than {_MAX_TIMES_LEFT_OUT} distinct times, which are left out; "
            "check the timestamp column"
        )
    kept_events = order[np.repeat(kept_users, lengths)]
    lengths = lengths[kept_users]
    del order
    items = _sorted_codes(events["item_id"])[kept_events]
    used = np.bincount(items) > 0
    codes = _sorted_codes(events["rating"])[kept_events]
    values = np.sort(events["rating"].unique().to_numpy())
    used_codes = np.bincount(codes, minlength=len(values)) > 0
    values = values[used_codes]
    starts_U1 = np.concatenate(([0], np.cumsum(lengths)))
    position = np.arange(len(items)) - np.repeat(starts_U1[:-1], lengths)
    places = (2 * position + 1) * _PLACES // (2 * np.repeat(lengths, lengths))
    return Ratings(
        starts_U1=starts_U1,
        items_E=(np.cumsum(used) - 1).astype(np.int32)[items],
        codes_E=(np.cumsum(used_codes) - 1).astype(np.min_scalar_type(len(values) - 1))[codes],
        places_E=places.astype(np.uint16),
        values_V=values,
        num_items=int(used.sum()),
    )


def _sorted_codes(column: pa.ChunkedArray) -> np.ndarray:
    """int64 (E,): index of every value among the distinct values, ascending."""
    codes, values = encoded(column)
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(values.to_numpy(zero_copy_only=False))] = np.arange(len(values))
    return rank[codes]


def top_singular(
    starts_U1: np.ndarray, items_E: np.ndarray, values_E: np.ndarray, num_items: int, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest `rank` singular values of a sparse (U, I) matrix, by block Lanczos with full orthogonalization.

    The basis grows by `rank` + 8 vectors a pass until no singular value changes by more than 1e-6 of itself. It starts
    from fixed random vectors, so that the result depends on the matrix alone. Products with the matrix are in float32,
    for which they are several times faster; all else is in float64.

    Args:
        starts_U1, items_E, values_E: rows in compressed form; entries at the same place add up.
    Returns:
        left (U, rank), values (rank,) descending, right (I, rank); float64.
    """
    num_users = len(starts_U1) - 1
    by_item = np.argsort(items_E, kind="stable")
    item_starts = np.concatenate(([0], np.cumsum(np.bincount(items_E, minlength=num_items))))
    owners = np.repeat(np.arange(num_users, dtype=np.int32), np.diff(starts_U1))
    forward = _bags(starts_U1, items_E, values_E)
    backward = _bags(item_starts, owners[by_item], values_E[by_item])
    transposed = num_users < num_items
    if transposed:
        forward, backward = backward, forward
    size = min(num_users, num_items)
    block = torch.from_numpy(np.random.default_rng(0).standard_normal((size, min(rank + _OVERSAMPLE, size))))
    block = torch.linalg.qr(block).Q
    basis, images = block[:, :0], torch.zeros(max(num_users, num_items), 0, dtype=torch.float64)
    last = torch.full((rank,), torch.inf, dtype=torch.float64)
    for _ in range(_MAX_PASSES):
        image = _product(forward, block)
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        squares, rotation = torch.linalg.eigh(images.T @ images)
        squares, rotation = squares[-rank:].flip(0).clamp_min(0), rotation[:, -rank:].flip(1)
        values = squares.sqrt()
        room = size - basis.shape[1]
        if room == 0 or bool(((values - last).abs() <= _TOLERANCE * values).all()):
            break
        last = values
        block = _product(backward, image)
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block).Q[:, :room]
    # A value of zero has no image; its vector on that side does not matter to the product.
    near = basis @ rotation
    far = images @ rotation / values.clamp_min(torch.finfo(torch.float64).tiny)
    left, right = (near, far) if transposed else (far, near)
    return left.numpy(), values.numpy(), right.numpy()


_Bags = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _bags(starts: np.ndarray, columns: np.ndarray, values: np.ndarray) -> _Bags:
    kind = np.int32 if len(columns) < 1 << 31 else np.int64
    # Offsets and columns must be of one type; the narrow one halves what a pass reads.
    return (
        torch.from_numpy(starts.astype(kind)),
        torch.from_numpy(columns.astype(kind, copy=False)),
        torch.from_numpy(values.astype(np.float32)),
    )


def _product(matrix: _Bags, dense: torch.Tensor) -> torch.Tensor:
    """Sparse times dense; a weighted sum of embedding rows, which every build of PyTorch has."""
    starts, columns, values = matrix
    result = torch.nn.functional.embedding_bag(
        columns, dense.float().contiguous(), starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )
    return result.double()


def reduce_ratings(ratings: Ratings, rows: int, cols: int) -> np.ndarray:
    """float64 (rows, cols) in [0, 1], 6 decimals: the pattern G with the leading singular values of the ratings.

    Ratings are centered and scaled to [-1, 1] before; where all are equal they count as 1.

    Raises:
        DataError: a multiplier asks for more singular values than the matrix has.
    """
    rank = min(rows, cols)
    smallest = min(ratings.num_users, ratings.num_items)
    if rank > smallest:
        raise DataError(
            f"multipliers: got {rows} x {cols}, expected the smaller at most {smallest}, which is all that "
            f"{ratings.num_users} users by {ratings.num_items} items give; choose a smaller multiplier"
        )
    if len(ratings.values_V) > 1:
        scaled = ratings.values_V.astype(np.float64)
        shares = np.bincount(ratings.codes_E, minlength=len(scaled)) / ratings.num_events
        scaled -= scaled @ shares
        scaled /= np.abs(scaled).max()
    else:
        scaled = np.ones(1)
    left, values, right = top_singular(
        ratings.starts_U1, ratings.items_E, scaled[ratings.codes_E], ratings.num_items, rank
    )
    pattern = (_resized(left, rows) * values) @ _resized(right, cols).T
    low, high = pattern.min(), pattern.max()
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        return np.ones((rows, cols))
    # The last bits depend on the number of threads; what is made from them should not.
    return np.round((pattern - low) / (high - low), 6)


def _resized(vectors: np.ndarray, length: int) -> np.ndarray:
    """(length, k): columns of (N, k) resized, then the nearest matrix with orthonormal columns, M (M^T M)^(-1/2)."""
    image = torch.from_numpy(np.ascontiguousarray(vectors.T))[None, :, None, :]
    resized = torch.nn.functional.interpolate(image, size=(1, length), mode="bilinear", antialias=True)[0, :, 0]
    left, _, right = torch.linalg.svd(resized.T, full_matrices=False)
    return (left @ right).numpy()


@dataclass(frozen=True)
class Block:
    """One block: a thinned, shuffled copy of R. Rows are served in the new order, a range at a time."""

    ratings: Ratings
    kept_M: np.ndarray
    starts_U1: np.ndarray
    row_order_U: np.ndarray
    columns_I: np.ndarray

    def counts(self) -> np.ndarray:
        """int64 (U,): entries of every row."""
        return np.diff(self.starts_U1)[self.row_order_U]

    def item_counts(self) -> np.ndarray:
        """int64 (I,): entries of every column."""
        result = np.empty(self.ratings.num_items, dtype=np.int64)
        result[self.columns_I] = np.bincount(self.ratings.items_E[self.kept_M], minlength=len(result))
        return result

    def rows(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Entries of rows first..last-1: `counts` uint32 (last - first,), then a value an entry, row by row.

        These are `columns` uint32, `places` uint16 and `codes` in the type of the ratings' codes.
        """
        sources = self.row_order_U[first:last]
        starts = self.starts_U1[sources]
        counts = self.starts_U1[sources + 1] - starts
        shifts = starts - np.concatenate(([0], np.cumsum(counts)[:-1]))
        entries = self.kept_M[np.arange(counts.sum()) + np.repeat(shifts, counts)]
        return {
            "counts": counts.astype(np.uint32),
            "columns": self.columns_I[self.ratings.items_E[entries]],
            "places": self.ratings.places_E[entries],
            "codes": self.ratings.codes_E[entries],
        }


class Expansion:
    """The randomized Kronecker product of the pattern G and the ratings R.

    Args:
        pattern: (rows, cols) of `settings`, in [0, 1]; default: `reduce_ratings`.
    Raises:
        DataError: settings are out of range.
    """

    def __init__(self, ratings: Ratings, settings: Settings, pattern: np.ndarray | None = None) -> None:
        settings.check()
        rows, cols = settings.num_row_multiplier, settings.num_col_multiplier
        self.ratings = ratings
        self.settings = settings
        self.pattern = reduce_ratings(ratings, rows, cols) if pattern is None else pattern
        kept = np.clip(self.pattern * settings.element_sample_rate, MIN_KEPT, MAX_KEPT)
        self.block_events = np.maximum(1, np.rint(kept * ratings.num_events)).astype(np.int64)
        for i in range(rows):
            # A draw of its own for a row of blocks: a generator a block would cost more than the draw.
            draws = self._generator(0, i).random(cols)
            self.block_events[i, draws >= settings.block_sample_rate] = 0

    @property
    def num_users(self) -> int:
        return self.settings.num_row_multiplier * self.ratings.num_users

    @property
    def num_items(self) -> int:
        return self.settings.num_col_multiplier * self.ratings.num_items

    @property
    def shard_events(self) -> np.ndarray:
        """int64 (rows,): entries of every row of blocks, exact."""
        return self.block_events.sum(axis=1)

    def fingerprint(self) -> dict[str, Any]:
        """What the output depends on: the settings and a checksum of the ratings."""
        return {**asdict(self.settings), "ratings": self.ratings.fingerprint}

    def block(self, i: int, j: int) -> Block:
        """Block (i, j), the same at every call; it has `block_events[i, j]` entries, which must not be 0."""
        ratings, generator = self.ratings, self._generator(1, i, j)
        total, wanted = ratings.num_events, int(self.block_events[i, j])
        # Drawing the smaller part costs less; without its shuffle a draw is a set.
        drop = 2 * wanted > total
        drawn = generator.choice(total, total - wanted if drop else wanted, replace=False, shuffle=False)
        mask = np.full(total, drop)
        mask[drawn] = not drop
        del drawn
        kept = np.flatnonzero(mask).astype(np.int32 if total < 1 << 31 else np.int64)
        return Block(
            ratings=ratings,
            kept_M=kept,
            starts_U1=np.searchsorted(kept, ratings.starts_U1.astype(kept.dtype)),
            row_order_U=generator.permutation(ratings.num_users),
            columns_I=generator.permutation(ratings.num_items).astype(np.uint32),
        )

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.settings.random_seed, spawn_key=key))
