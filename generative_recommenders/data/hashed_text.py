"""Text embeddings without a language model: hashed n-grams, TF-IDF, a truncated SVD (latent semantic analysis).

A text becomes its words, pairs of neighboring words, and pieces of 3 and 4 bytes of its words (their ends marked), each
known by a 64-bit hash. The most frequent ones are kept, weighted by `(1 + log count) log(1 + n / df)` and projected on
the leading right singular vectors (Deerwester et al., 1990). Those come from a randomized SVD with subspace iterations
(Halko, Martinsson and Tropp, SIAM Review 53(2), 2011, algorithm 4.4). Unlike a feature hash into few buckets, 64 bits
leave no two n-grams of a catalogue in one place.

All is a function of the set of texts, the settings and the seed: texts are sorted first, and no order of a dictionary
or of threads enters. Rows have length 1, or 0 for a text without a known n-gram.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from generative_recommenders.data.errors import DataError

STATE_FILE = "encoder.safetensors"
_CHUNK_TEXTS = 16_384
_PIECES = (3, 4)
_OVERSAMPLES = 16
_ITERATIONS = 4
_PRIME = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class HashedText:
    """Settings of an encoder that is fitted to the texts it is to encode.

    Attributes:
        dimension: width of an embedding.
        seed: of the random projection that the SVD starts from.
        features: at most so many n-grams are kept, those of most texts.
        piece_weight: weight of a piece of a word beside 1 for words and pairs.
        fit_texts: the SVD sees at most so many texts, evenly spaced among the sorted ones.
    """

    dimension: int = 256
    seed: int = 0
    features: int = 1 << 15
    piece_weight: float = 1.0
    fit_texts: int = 100_000

    def __post_init__(self) -> None:
        for name, low in (("dimension", 1), ("features", 1), ("fit_texts", 1), ("piece_weight", 0)):
            if getattr(self, name) < low:
                raise DataError(f"hashed.{name}: got {getattr(self, name)}, expected at least {low}; correct it")

    def fit(self, texts: Sequence[str]) -> FittedHashedText:
        """An encoder for texts like these.

        Raises:
            DataError: no text has a word.
        """
        distinct = sorted(set(texts))
        if len(distinct) > self.fit_texts:
            places = np.linspace(0, len(distinct) - 1, self.fit_texts).astype(np.int64)
            distinct = [distinct[place] for place in places.tolist()]
        grams, counts = _document_counts(distinct)
        if not len(grams):
            raise DataError(f"texts: got {len(distinct)} without a single word, expected texts; check the template")
        kept = np.sort(np.lexsort((grams, -counts))[: self.features])
        grams, counts = grams[kept], counts[kept]
        weights = np.log1p(len(distinct) / counts).astype(np.float32)
        bare = FittedHashedText(self, grams, weights, torch.zeros(len(grams), self.dimension))
        vectors = _right_singular_vectors(_Rows.concatenated(list(bare.rows(distinct))), len(grams), self)
        return FittedHashedText(self, grams, weights, vectors)


@dataclass(frozen=True)
class FittedHashedText:
    """A fitted encoder of F n-grams and width D.

    Attributes:
        grams: hashes, uint64 (F,), ascending.
        weights: float32 (F,), of an n-gram by its number of texts.
        projection_FD: float32.
    """

    config: HashedText
    grams: np.ndarray
    weights: np.ndarray
    projection_FD: Tensor

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        return self.config.dimension

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32, rows of length 1, or 0 for a text without a known n-gram."""
        parts = [rows.times(self.projection_FD) for rows in self.rows(texts)]
        return functional.normalize(torch.cat(parts) if parts else torch.zeros(0, self.dimension), dim=1)

    def rows(self, texts: Sequence[str]) -> Iterator[_Rows]:
        """The weighted n-grams of the texts, each row of length 1."""
        for first in range(0, len(texts), _CHUNK_TEXTS):
            chunk = texts[first : first + _CHUNK_TEXTS]
            owners, hashes, weights = _grams(chunk, self.config.piece_weight)
            places = np.searchsorted(self.grams, hashes).clip(max=len(self.grams) - 1)
            known = self.grams[places] == hashes
            keys = owners[known] * len(self.grams) + places[known]
            keys, one_of, counts = np.unique(keys, return_index=True, return_counts=True)
            owners, columns = np.divmod(keys, len(self.grams))
            values = weights[known][one_of] * (1 + np.log(counts)) * self.weights[columns]
            lengths = np.sqrt(np.bincount(owners, weights=values**2, minlength=len(chunk)))
            yield _Rows.of(owners, columns, values / lengths[owners], len(chunk))

    def save(self, folder: Path) -> None:
        """Write `encoder.safetensors` into an existing folder."""
        tensors = {
            "grams": torch.from_numpy(self.grams.view(np.int64)),
            "weights": torch.from_numpy(self.weights),
            "projection": self.projection_FD,
        }
        save_file(tensors, folder / STATE_FILE, metadata={"config": json.dumps(asdict(self.config))})

    @classmethod
    def load(cls, path: Path) -> FittedHashedText:
        """Read what `save` wrote; `path` is the file or its folder.

        Raises:
            DataError: the file is missing, damaged, or not of this encoder.
        """
        path = path / STATE_FILE if path.is_dir() else path
        try:
            with safe_open(path, "pt") as file:
                config = HashedText(**json.loads(file.metadata()["config"]))
                grams = file.get_tensor("grams").numpy().view(np.uint64)
                return cls(config, grams, file.get_tensor("weights").numpy(), file.get_tensor("projection"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path}: no fitted text encoder ({reason:.120}); name a folder of embeddings") from error

    @property
    def fingerprint(self) -> str:
        """sha256 over settings, n-grams, weights and projection."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for array in (self.grams, self.weights, self.projection_FD.numpy()):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Rows:
    """A sparse matrix by rows: offsets of the R rows, column and value of each entry."""

    offsets: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, owners: np.ndarray, columns: np.ndarray, values: np.ndarray, rows: int) -> _Rows:
        """From entries in the order of their rows."""
        starts = np.cumsum(np.bincount(owners, minlength=rows)) - np.bincount(owners, minlength=rows)
        return cls(torch.from_numpy(starts), torch.from_numpy(columns), torch.from_numpy(values.astype(np.float32)))

    @classmethod
    def concatenated(cls, blocks: Sequence[_Rows]) -> _Rows:
        """One below the other."""
        entries = np.cumsum([0] + [block.columns.numel() for block in blocks]).tolist()
        offsets = [block.offsets + entries[place] for place, block in enumerate(blocks)]
        columns, values = [block.columns for block in blocks], [block.values for block in blocks]
        return cls(torch.cat(offsets), torch.cat(columns), torch.cat(values))

    def transposed(self, width: int) -> _Rows:
        """The `width` columns as rows."""
        rows = np.repeat(
            np.arange(self.offsets.numel()), np.diff(np.append(self.offsets.numpy(), self.columns.numel()))
        )
        order = np.argsort(self.columns.numpy(), kind="stable")
        return _Rows.of(self.columns.numpy()[order], rows[order], self.values.numpy()[order], width)

    def times(self, dense: Tensor) -> Tensor:
        """The product with a dense matrix; every row is one sum in a fixed order, however many threads there are."""
        # Factors of LAPACK come by columns, which this is many times slower on.
        dense = dense.contiguous()
        return functional.embedding_bag(self.columns, dense, self.offsets, mode="sum", per_sample_weights=self.values)


def _right_singular_vectors(rows: _Rows, width: int, config: HashedText) -> Tensor:
    """(width, dimension), column k the vector of the k-th largest singular value; zeros beyond the rank."""
    rank = min(config.dimension, rows.offsets.numel(), width)
    size = min(rank + _OVERSAMPLES, rows.offsets.numel(), width)
    generator = torch.Generator().manual_seed(config.seed)
    columns = rows.transposed(width)
    basis = _orthonormal(rows.times(torch.randn(width, size, generator=generator)))
    for _ in range(_ITERATIONS):
        basis = _orthonormal(rows.times(_orthonormal(columns.times(basis))))
    with _one_thread():
        vectors, sizes, _ = torch.linalg.svd(columns.times(basis), full_matrices=False)
    vectors = vectors[:, :rank] * (sizes[:rank] > 1e-5 * sizes[0])
    # The sign of a singular vector is arbitrary; the largest entry is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    result = torch.zeros(width, config.dimension)
    result[:, :rank] = vectors * torch.where(largest < 0, -1.0, 1.0)
    return result


def _orthonormal(matrix: Tensor) -> Tensor:
    with _one_thread():
        return torch.linalg.qr(matrix)[0]


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's sums depend on the number of threads in the last digits; sparse products here do not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _document_counts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All n-grams of the texts, ascending uint64, and in how many texts each is."""
    grams, counts = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    for first in range(0, len(texts), _CHUNK_TEXTS):
        owners, hashes, _ = _grams(texts[first : first + _CHUNK_TEXTS], 1.0)
        here, codes = np.unique(hashes, return_inverse=True)
        if not len(here):
            continue
        pairs = np.sort(owners * len(here) + codes)
        first_of_pair = np.concatenate(([True], pairs[1:] != pairs[:-1]))
        found = np.bincount(pairs[first_of_pair] % len(here), minlength=len(here))
        grams, codes = np.unique(np.concatenate((grams, here)), return_inverse=True)
        counts = np.bincount(codes, weights=np.concatenate((counts, found)), minlength=len(grams)).astype(np.int64)
    return grams, counts


def _grams(texts: Sequence[str], piece_weight: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n-grams of all texts, repeated ones as often as they come: text int64, hash uint64, weight float32."""
    lower = pc.utf8_lower(pa.array(texts, pa.large_string()))
    lists = pc.split_pattern(pc.utf8_trim_whitespace(pc.replace_substring_regex(lower, r"[^\p{L}\p{N}]+", " ")), " ")
    encoded = pc.list_flatten(lists).dictionary_encode()
    owners = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    words = encoded.indices.to_numpy().astype(np.int64)
    # A text without a word splits into one empty word.
    filled = pc.not_equal(encoded.dictionary, "").to_numpy(zero_copy_only=False)[words] if len(words) else words > 0
    owners, words = owners[filled], words[filled]
    if not len(words):
        return owners, np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.float32)
    whole, piece_owner, pieces = _word_hashes(encoded.dictionary)
    hashes = whole[words]
    beside = owners[1:] == owners[:-1]
    pairs = _mixed(hashes[:-1][beside] * np.uint64(_PRIME) + hashes[1:][beside])
    sizes = np.bincount(piece_owner, minlength=len(whole))
    starts = np.cumsum(sizes) - sizes
    repeats = sizes[words]
    ends = np.cumsum(repeats)
    places = np.arange(ends[-1]) - np.repeat(ends - repeats, repeats) + np.repeat(starts[words], repeats)
    all_owners = np.concatenate((owners, owners[1:][beside], np.repeat(owners, repeats)))
    weights = np.ones(len(all_owners), dtype=np.float32)
    weights[len(owners) + len(pairs) :] = piece_weight
    return all_owners, np.concatenate((hashes, pairs, pieces[places])), weights


def _word_hashes(words: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hash of each word; and word and hash of every piece of a word, in the order of the words."""
    begin, end, nothing = (pa.scalar(sign, pa.large_string()) for sign in ("\2", "\3", ""))
    marked = pc.binary_join_element_wise(begin, words, end, nothing)
    _, offset_bytes, data = marked.buffers()
    offsets = np.frombuffer(offset_bytes, np.int64)[: len(marked) + 1]
    stream = np.frombuffer(data, np.uint8)[: offsets[-1]].astype(np.uint64)
    owner = np.repeat(np.arange(len(marked)), np.diff(offsets))
    # A polynomial in an odd number; its inverse modulo 2^64 moves a word to the beginning of the stream.
    powers = np.cumprod(np.full(len(stream), _PRIME, dtype=np.uint64))
    sums = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(stream * powers)))
    back = np.cumprod(np.full(len(stream), pow(_PRIME, -1, 1 << 64), dtype=np.uint64))
    whole = _mixed((sums[offsets[1:]] - sums[offsets[:-1]]) * back[offsets[:-1]])
    places, hashes = [], []
    for length in _PIECES:
        if len(stream) < length:
            continue
        starts = np.flatnonzero(owner[: len(owner) - length + 1] == owner[length - 1 :])
        places.append(starts)
        hashes.append(_mixed((sums[starts + length] - sums[starts]) * back[starts] + np.uint64(length)))
    starts = np.concatenate(places)
    order = np.argsort(starts, kind="stable")
    return whole, owner[starts[order]], np.concatenate(hashes)[order]


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
