"""Bindings `specgr.*`: how drafts are made and verified, and what of an evaluation is done with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from generative_recommenders.config import configurable
from generative_recommenders.errors import UserError
from generative_recommenders.generative.item_paths import Score


@configurable("specgr")
@dataclass(frozen=True)
class SpecGRConfig:
    """Bindings `specgr.*`.

    drafter: "encoder" is the model's own draft head, "semantic_knn" the similarity of the items' text vectors (those of
    `train_tokenizer.encoder`; to the newest `knn_last_n` events, 0 for all, whitened with `knn_whiten`), and
    "retrieval" a model of `train_fn` on the same dataset: that of `drafter_checkpoint`, or the newest finished run of
    the config file `drafter_config`, which is trained first where there is none.

    knn_weight: with the drafters "encoder" and "retrieval" this much of that similarity, by the same `knn_…` bindings,
    is added to their scores, which makes new items easier to draft. 0 is none.

    draft_size: items drafted a round. num_beams: prefixes that drafts of later rounds have to begin with. threshold: an
    item is accepted where its mean log-probability a code is above. target_acceptance: instead of the threshold given,
    the one that accepts this share of first-round drafts of the validation split; 0 is off.

    score: which codes that mean is over. An item that training has seen counts all of them. Others count all but the
    last with "drop_last"; with "in_sample_prefix" those that they have in common with some item that training has seen,
    but `min_prefix` at least. With "drop_last_of_all" (ours) no item counts its last code, which often only tells items
    apart that are alike in all others: it is nearly certain then, and raises the mean of those that count it; nor does
    it have to be decoded.

    drafter_weight: what of the drafter's score is added to an item's own where lists are put in order; 0, as published,
    leaves the order to the verifier. Scores of drafters differ in scale: cosines with "semantic_knn", and
    with "encoder" unless `draft_head.l2_norm` is off.

    eval_mode: users that are evaluated: "all", those whose target training has seen ("in_sample"), or the others
    ("unseen"). max_eval_steps: batches that are evaluated; 0 is all.

    Raises:
        UserError: a value outside its range.
    """

    drafter: Literal["encoder", "semantic_knn", "retrieval"] = "encoder"
    drafter_checkpoint: str = ""
    drafter_config: str = ""
    knn_last_n: int = 0
    knn_whiten: bool = False
    knn_weight: float = 0.0
    draft_size: int = 50
    num_beams: int = 30
    threshold: float = -1.4
    target_acceptance: float = 0.0
    score: Score = "drop_last"
    min_prefix: int = 3
    drafter_weight: float = 0.0
    eval_mode: Literal["all", "in_sample", "unseen"] = "all"
    max_eval_steps: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("drafter", ("encoder", "semantic_knn", "retrieval")),
            ("score", get_args(Score)),
            ("eval_mode", ("all", "in_sample", "unseen")),
        ):
            self._expect(name, getattr(self, name) in choices, "one of " + ", ".join(map(repr, choices)))
        for name in ("draft_size", "num_beams", "min_prefix"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("knn_last_n", self.knn_last_n >= 0, "at least 0; 0 is all events")
        self._expect("max_eval_steps", self.max_eval_steps >= 0, "at least 0; 0 is all batches")
        self._expect("knn_weight", 0 <= self.knn_weight < math.inf, "0 or more")
        self._expect(
            "knn_weight",
            self.knn_weight == 0 or self.drafter != "semantic_knn",
            "0 with specgr.drafter = 'semantic_knn', which is that similarity alone",
        )
        self._expect("drafter_weight", 0 <= self.drafter_weight < math.inf, "0 or more")
        self._expect("threshold", not math.isnan(self.threshold), "a number; log-probabilities are below 0")
        self._expect("target_acceptance", 0 <= self.target_acceptance <= 1, "a share from 0 to 1; 0 is off")
        self._expect(
            "drafter_checkpoint",
            bool(self.drafter_checkpoint) + bool(self.drafter_config) == (self.drafter == "retrieval"),
            "this or specgr.drafter_config with specgr.drafter = 'retrieval', and neither otherwise",
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"specgr.{name}: got {getattr(self, name)!r}, expected {expected}")
