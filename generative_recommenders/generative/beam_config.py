"""Bindings `beam_search.*`: how wide a search over semantic IDs is, what it may return and what it proves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from generative_recommenders.config import configurable
from generative_recommenders.errors import UserError

T = TypeVar("T")


@configurable("beam_search")
@dataclass(frozen=True)
class BeamSearchConfig:
    """Bindings `beam_search.*`.

    widths: prefixes kept a level, one number for all levels or a list of one a level; more than there are prefixes is
    all of them. The last level keeps at least as many as there are results to return, which costs the model nothing.

    constrained: every step chooses among the codes that lead to an item (of those allowed), all of them compared. Off:
    among all codes, and what turns out to be no item is dropped at the end.

    normalization: of a code's probability, over the "vocabulary" of its level or over its "legal" codes, those that
    lead to an allowed item. length_normalize: scores are divided by the number of levels. temperature: logits are
    divided by it, one number or one a level; scores are those of the changed distribution.

    stochastic: results are a sample without replacement from the model (over legal codes, where constrained) instead of
    the best; the same `seed`, user and history give the same sample in any batch.

    certify: requests whose list is not proven to be the exact top-K are searched again, four times as wide a round,
    until it is or the round would ask the model for more than `budget` further prefixes of one request in all.

    verify: results are scored again by teacher forcing and checked: legal, allowed, distinct, in order. For tests and
    for trust; costs a forward pass over K candidates. Scores may differ by verify_tolerance, absolute up to 1 and
    relative above; models in bfloat16 want about 0.05.
    """

    widths: tuple[int, ...] | int = 20
    constrained: bool = True
    normalization: Literal["vocabulary", "legal"] = "vocabulary"
    length_normalize: bool = False
    temperature: tuple[float, ...] | float = 1.0
    stochastic: bool = False
    seed: int = 0
    certify: bool = False
    budget: int = 10_000
    verify: bool = False
    verify_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        widths, temperatures = _listed(self.widths), _listed(self.temperature)
        whole = all(isinstance(width, int) for width in widths)
        self._expect("widths", whole and len(widths) > 0 and min(widths) >= 1, "at least 1 beam at every level")
        above_zero = all(0 < temperature < math.inf for temperature in temperatures)
        self._expect("temperature", len(temperatures) > 0 and above_zero, "more than 0 at every level")
        self._expect("normalization", self.normalization in ("vocabulary", "legal"), "'vocabulary' or 'legal'")
        self._expect(
            "normalization",
            self.constrained or self.normalization == "vocabulary",
            "'vocabulary' with beam_search.constrained = False",
        )
        self._expect("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        self._expect("budget", self.budget >= 0, "at least 0")
        self._expect("verify_tolerance", self.verify_tolerance > 0, "more than 0")
        self._expect(
            "certify",
            not (self.certify and self.stochastic),
            "False with beam_search.stochastic = True: a sample is no top-K",
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"beam_search.{name}: got {getattr(self, name)!r}, expected {expected}")

    def widths_for(self, sizes: tuple[int, ...], k: int, nodes: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Prefixes kept at each level, at most those there are: by `sizes`, and by `nodes` of a trie where constrained.

        Raises:
            UserError: the list has another number of levels.
        """
        widths = list(self._per_level("widths", self.widths, len(sizes)))
        widths[-1] = max(widths[-1], k)
        kept, before = [], 1
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            before = min(width, before * size)
            if nodes is not None and self.constrained:
                before = min(before, nodes[level])
            kept.append(before)
        return tuple(kept)

    def temperatures_for(self, levels: int) -> tuple[float, ...]:
        """Temperature of each level. Raises UserError for a list of another number of levels."""
        return self._per_level("temperature", self.temperature, levels)

    def _per_level(self, name: str, value: tuple[T, ...] | T, levels: int) -> tuple[T, ...]:
        values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
        self._expect(name, len(values) == levels, f"one number, or one for each of the {levels} levels of the IDs")
        return values

    def divisor(self, levels: int) -> float:
        """What the sum of a result's log-probabilities is divided by."""
        return float(levels) if self.length_normalize else 1.0

    def widened(self, factor: int) -> BeamSearchConfig:
        """The same search, `factor` times as wide at every level."""
        if isinstance(self.widths, int):
            return replace(self, widths=self.widths * factor)
        return replace(self, widths=tuple(width * factor for width in self.widths))


def _listed(value: tuple[T, ...] | T) -> tuple[T, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
