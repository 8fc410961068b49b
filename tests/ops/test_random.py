"""The counter-based generator: equal on every backend, exact at large ids, and random enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.random import MAX_HIGH, cpu, drop_threshold, fold, lane_bits, token_hash, uniform_ints
from ops.testing import Place, places

PLACES = places(cpu.refuses)

MASK = 2**32 - 1


def mix(x: int) -> int:
    """lowbias32 on Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def scalar_bits(seed: int, key: int, lane: int) -> int:
    seed, key = seed % 2**64, key % 2**64
    token = mix(mix((key & MASK) ^ (seed & MASK)) ^ (key >> 32) ^ ((seed >> 32) * 0x9E3779B9 & MASK))
    return mix((token + lane * 0x9E3779B9) & MASK)


def chi_square_z(counts: torch.Tensor) -> float:
    """Standard deviations by which the chi-square of equal expected counts is off."""
    expected = counts.sum().item() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return float((statistic - (len(counts) - 1)) / (2 * (len(counts) - 1)) ** 0.5)


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    key=st.integers(-(2**63), 2**63 - 1),
    high=st.one_of(st.integers(1, 2**24), st.integers(2**24 + 1, MAX_HIGH)),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("place", PLACES)
def test_uniform_ints_is_the_formula_on_python_integers(place: Place, seed: int, key: int, high: int) -> None:
    got = uniform_ints(seed, place.put(torch.tensor([key])), 3, high, backend=place.backend)[0].tolist()
    if high <= 2**24:
        wanted = [scalar_bits(seed, key, r) * high >> 32 for r in range(3)]
    else:
        wide = [scalar_bits(seed, key, 2 * r) << 32 | scalar_bits(seed, key, 2 * r + 1) for r in range(3)]
        wanted = [bits * high >> 64 for bits in wide]
    assert got == wanted


@pytest.mark.parametrize("place", places(cpu.refuses, reference=False))
@pytest.mark.parametrize("high", [1, 2, 3883, 2**24, 2**24 + 1, 440_000_001, MAX_HIGH])
@pytest.mark.parametrize(("tokens", "count"), [(0, 4), (1, 1), (3, 0), (517, 33)])
def test_backends_agree(place: Place, high: int, tokens: int, count: int) -> None:
    keys_T = torch.arange(tokens) * 7_919_000_000_001 - 3
    reference = uniform_ints(99, keys_T, count, high, backend="reference")
    assert reference.shape == (tokens, count)
    assert reference.dtype == torch.int64
    assert torch.equal(uniform_ints(99, place.put(keys_T), count, high, backend=place.backend).cpu(), reference)
    assert bool(((reference >= 0) & (reference < high)).all())


def test_ids_above_two_to_the_24_are_all_reachable() -> None:
    drawn = uniform_ints(fold(3), torch.arange(4000), 64, 440_000_001).flatten()
    # A float32 id would be a multiple of 32 up there, and 32-bit draws would make some residues rarer.
    assert chi_square_z(torch.bincount(drawn[drawn > 2**28] % 64, minlength=64).double()) < 4
    assert int(drawn.max()) > 439_000_000
    assert len(drawn.unique()) > 0.999 * len(drawn)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**62 + 1])
def test_bits_are_uniform(seed: int) -> None:
    bits = lane_bits(token_hash(seed, torch.arange(2000))[:, None], torch.arange(100))
    for shift in (0, 12, 24):
        assert abs(chi_square_z(torch.bincount((bits.flatten() >> shift) & 255, minlength=256).double())) < 4.5


def uniform(seed: int, keys_T: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
    return lane_bits(token_hash(seed, keys_T)[:, None], lanes).double() / 2**32 - 0.5


@pytest.mark.parametrize("neighbour", ["key", "lane", "seed", "seed bit 40", "key bit 40"])
def test_neighbours_are_uncorrelated(neighbour: str) -> None:
    seed, keys_T, lanes = fold(11), torch.arange(1500), torch.arange(100)
    other = {
        "key": lambda: uniform(seed, keys_T + 1, lanes),
        "lane": lambda: uniform(seed, keys_T, lanes + 1),
        "seed": lambda: uniform(seed + 1, keys_T, lanes),
        "seed bit 40": lambda: uniform(seed ^ 1 << 40, keys_T, lanes),
        "key bit 40": lambda: uniform(seed, keys_T + (1 << 40), lanes),
    }[neighbour]()
    correlation = (uniform(seed, keys_T, lanes) * other).mean().item() * 12
    assert abs(correlation) < 4.5 / (1500 * 100) ** 0.5


def test_every_output_bit_depends_on_every_key_bit() -> None:
    keys_T = torch.arange(4000)
    for bit in (0, 7, 31, 33, 62):
        flipped = token_hash(5, keys_T) ^ token_hash(5, keys_T ^ 1 << bit)
        rates = torch.stack([((flipped >> out) & 1).double().mean() for out in range(32)])
        assert bool(((rates - 0.5).abs() < 0.06).all())


def test_fold_separates_streams() -> None:
    seeds = {fold(s, a, b) for s in range(10) for a in range(30) for b in range(30)}
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({fold(1), fold(1, 0), fold(1, 0, 0), fold(1, 1), fold(0, 1), fold(2), fold(-1)}) == 7
    assert fold(7, 1, 2) == fold(7, 1, 2) != fold(7, 2, 1)


@pytest.mark.parametrize(("rate", "threshold"), [(0.0, 0), (0.5, 2**31), (0.2, 858993459)])
def test_drop_threshold(rate: float, threshold: int) -> None:
    assert drop_threshold(rate) == threshold


def test_bad_arguments_are_named() -> None:
    keys_T = torch.arange(3)
    for high in (0, MAX_HIGH + 1):
        with pytest.raises(ValueError, match=f"got high {high}"):
            uniform_ints(0, keys_T, 1, high)
    with pytest.raises(ValueError, match="got count -1"):
        uniform_ints(0, keys_T, -1, 5)
    with pytest.raises(ValueError, match="expected int64"):
        uniform_ints(0, keys_T.float(), 1, 5)
    with pytest.raises(ValueError, match="0 <= rate < 1"):
        drop_threshold(1.0)
