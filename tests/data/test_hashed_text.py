"""The hashed encoder: its n-grams against a loop, its SVD against an exact one, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from generative_recommenders.data.hashed_text import FittedHashedText, HashedText

COLORS, THINGS = ("red", "blue", "green", "black"), ("soap", "comb", "towel", "brush", "cream", "mirror")
TITLES = [f"{color} {thing}" for thing in THINGS for color in COLORS]


def test_hashed_vectors_span_what_an_exact_svd_does() -> None:
    texts = TITLES + [f"{title} {word}" for title in TITLES for word in ("travel size", "gift set", "refill")]
    fitted = HashedText(dimension=12).fit(texts)
    distinct = sorted(set(texts))
    (rows,) = fitted.rows(distinct)
    dense = rows.times(torch.eye(len(fitted.grams)))
    assert torch.allclose(dense.norm(dim=1), torch.ones(len(distinct)), atol=1e-5)
    exact = torch.linalg.svd(dense, full_matrices=False)
    projected = dense @ fitted.projection_FD
    assert torch.allclose(projected.norm(dim=0), exact.S[:12], rtol=1e-2)
    assert torch.allclose(fitted.projection_FD.T @ fitted.projection_FD, torch.eye(12), atol=1e-3)
    assert torch.allclose(fitted.encode(distinct), functional.normalize(projected, dim=1), atol=1e-4)


def test_grams_are_counted_as_a_loop_would() -> None:
    """In one text, each of its words, pairs and pieces has the weight `(1 + log count) * idf`, up to the length."""
    texts = ["aa bb aa", "aa", "ccc"]
    fitted = HashedText(dimension=2).fit(texts)
    assert len(fitted.grams) == len(
        {*("aa", "bb", "ccc"), ("aa", "bb"), ("bb", "aa")}
        | {"<aa", "aa>", "<aa>", "<bb", "bb>", "<bb>"}
        | {"<cc", "ccc/", "cc>", "<ccc", "ccc>"}
    )
    (rows,) = fitted.rows(["aa bb aa"])
    idf = {1: np.log1p(3 / 1), 2: np.log1p(3 / 2)}
    twice, once = (1 + np.log(2)) * idf[2], idf[1]
    # aa, <aa, aa>, <aa> come twice; bb with its three pieces and both pairs once.
    expected = np.array([twice] * 4 + [once] * 6)
    expected /= np.linalg.norm(expected)
    assert np.allclose(np.sort(rows.values.numpy()), np.sort(expected), atol=1e-5)


def test_no_two_grams_share_a_hash() -> None:
    words = [f"w{number:x}" for number in range(20_000)]
    fitted = HashedText(dimension=1, features=1 << 20, fit_texts=20_000).fit(words)
    marked = [f"\2{word}\3" for word in words]
    pieces = {word[i : i + n] for word in marked for n in (3, 4) for i in range(len(word) - n + 1)}
    assert len(fitted.grams) == len(words) + len(pieces)


def test_case_and_signs_do_not_matter_and_unknown_texts_are_zero(tmp_path: Path) -> None:
    fitted = HashedText(dimension=8).fit(TITLES)
    one, other, nothing, unknown = fitted.encode(["Red, SOAP!", "red soap", "", "\u4e2d\u6587"])
    assert torch.equal(one, other)
    assert not nothing.any()
    assert not unknown.any()
    assert fitted.encode([]).shape == (0, 8)


def test_more_dimensions_than_texts_are_zeros() -> None:
    fitted = HashedText(dimension=50).fit(["one thing", "two things", "three"])
    values = fitted.encode(["one thing", "three"])
    assert values.shape == (2, 50)
    assert not values[:, 3:].any()
    assert torch.allclose(values.norm(dim=1), torch.ones(2), atol=1e-5)


def test_order_and_number_of_texts_do_not_matter() -> None:
    shuffled = [TITLES[place] for place in np.random.default_rng(0).permutation(len(TITLES))]
    one, other = HashedText(dimension=8).fit(TITLES), HashedText(dimension=8).fit(shuffled + shuffled[:5])
    assert one.fingerprint == other.fingerprint
    assert HashedText(dimension=8, seed=1).fit(TITLES).fingerprint != one.fingerprint


def test_fitted_encoder_survives_the_disk(tmp_path: Path) -> None:
    fitted = HashedText(dimension=4).fit(TITLES)
    fitted.save(tmp_path)
    loaded = FittedHashedText.load(tmp_path)
    assert loaded.fingerprint == fitted.fingerprint
    assert torch.equal(loaded.encode(TITLES), fitted.encode(TITLES))


def test_threads_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"word{number:x}" for number in range(900)])
    texts = [" ".join(row) for row in words[rng.integers(0, 900, (1500, 6))]]
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(HashedText(dimension=128).fit(texts).fingerprint)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
